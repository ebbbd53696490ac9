"""One layer's part of a calibrated run: its weights are quantized, and hidden states go through them.

Shape suffixes: B sequences, L tokens of a sequence, D hidden, T = B x L, E experts.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from dsv3_tools.conversion.making import Place
from dsv3_tools.conversion.plan import ShardPlan, Step
from dsv3_tools.conversion.progress import Meter
from dsv3_tools.errors import CheckpointError
from dsv3_tools.formats import Format
from dsv3_tools.model.mlp import gated_mlp
from dsv3_tools.model.moe import Routes
from dsv3_tools.model.parallel import ALONE, RankGroup
from dsv3_tools.model.prefetch import Order
from dsv3_tools.model.transformer import Transformer
from dsv3_tools.model.units import layer_orders
from dsv3_tools.model.weights import Unit, Wanted
from dsv3_tools.quantize.coding import Memory
from dsv3_tools.quantize.experts import ExpertResult, LayerInputs, quantize_expert, spread
from dsv3_tools.quantize.figures import MatrixFigures
from dsv3_tools.quantize.host import HostBuffers
from dsv3_tools.quantize.linears import STAGES, Seen, quantize_stage
from dsv3_tools.quantize.parallel import in_parallel
from dsv3_tools.quantize.recipe import Recipe
from dsv3_tools.quantize.resident import Resident, decode
from dsv3_tools.quantize.states import States
from dsv3_tools.quantize.written import WrittenParts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TOKENS_OF_EXPERTS", "LayerWork"]

TOKENS_OF_EXPERTS = 32768
"""Tokens that go through a layer's experts together: each gets as many as are worth decoding it."""

Found = tuple[list[MatrixFigures], tuple[int, ...], tuple[float, float]]


class LayerWork:
    """One layer's weights, and what is done with them.

    Args:
        model: the source's.
        number: of the layer.
        steps: the weights that are quantized, by name.
        recipe: how.
        place: of the run.
        ranks: that share the work.
    """

    def __init__(
        self,
        model: Transformer,
        number: int,
        steps: Mapping[str, Step],
        recipe: Recipe,
        place: Place,
        ranks: RankGroup,
    ) -> None:
        self._model = model
        self._number = number
        self._steps = steps
        self._recipe = recipe
        self._place = place
        self._ranks = ranks
        orders = layer_orders(model.settings, number, ALONE)
        self._units: dict[Hashable, Unit] = {_part(order): order.unit for order in orders}
        self._experts = [key for key in self._units if isinstance(key, int)]
        self._resident = Resident(model.dtype)
        self._memories: dict[Hashable, tuple[Memory, Mapping[str, Step]]] = {}

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def quantize(self, states: States, meter: Meter) -> Found:
        """Quantizes the layer's weights and takes the hidden states through it; returns their figures."""
        figures: list[MatrixFigures] = []
        self._read_plain()
        figures += self._quantize_unit("attention", states, meter)
        layer = self._model.layer(self._number, self._resident)
        states.update(layer.attention)
        figures += self._quantize_unit("mlp", states, meter)
        tokens: tuple[int, ...] = ()
        output_error = 0.0, 0.0
        if self._experts and self._made_names(self._experts[0]):
            routes = self._route(states)
            found, tokens, output_error = self._quantize_experts(states, routes, meter)
            figures += found
        self._keep_stored_experts()
        states.update(lambda block: layer.mlp(block)[0], tokens=TOKENS_OF_EXPERTS)
        return figures, tokens, output_error

    def load(self, shards: Sequence[ShardPlan]) -> bool:
        """Reads quantized weights from shards that an earlier run has written; False if one is not here."""
        with ExitStack() as opened:
            try:
                parts = WrittenParts(self._place.destination, [shard.name for shard in shards], opened)
            except FileNotFoundError:  # uploaded, and removed
                return False
            for key in self._units:
                if names := self._made_names(key):
                    memory = self._new_memory(names)
                    for name, step in names.items():
                        for part, tensor in memory.parts[name].items():
                            parts.read(step.outputs[part], tensor)
                    self._keep(key, memory, names)
        return True

    def forward(self, states: States) -> None:
        """Takes hidden states through the layer, all of whose weights are there."""
        self._read_plain()
        self._keep_stored_experts()
        layer = self._model.layer(self._number, self._resident)
        states.update(layer.attention)
        states.update(lambda block: layer.mlp(block)[0], tokens=TOKENS_OF_EXPERTS)

    def made_parts(self, host: HostBuffers, wanted: Container[str]) -> dict[str, Tensor]:
        """Returns the quantized parts that are `wanted`, by tensor name, in host memory."""
        kept = [
            (memory, names)
            for memory, names in self._memories.values()
            if any(output in wanted for step in names.values() for output in step.outputs.values())
        ]
        flats = host.copy([memory.flat for memory, _ in kept])
        found: dict[str, Tensor] = {}
        for (memory, names), flat in zip(kept, flats, strict=True):
            parts = memory.views(flat)
            for name, step in names.items():
                found |= {step.outputs[part]: tensor for part, tensor in parts[name].items()}
        return found

    def _made_names(self, key: Hashable) -> dict[str, Step]:
        """Returns those of a unit's weights that are quantized, by their name in the unit."""
        unit = self._units.get(key, {})
        return {name: self._steps[w.name] for name, w in unit.items() if w.name in self._steps}

    def _read_plain(self) -> None:
        """Reads everything but routed experts and what is there already."""
        orders = []
        for key, unit in self._units.items():
            if key in self._experts:
                continue
            left = {name: wanted for name, wanted in unit.items() if not self._is_kept(key, name)}
            orders.append(Order(key, left))
        with self._model.reading(orders) as weights:
            for order in orders:
                taken = weights.take(order.key, order.unit)
                self._resident.decoded.setdefault((self._number, order.key), {}).update(taken)

    def _is_kept(self, key: Hashable, name: str) -> bool:
        return name in self._resident.encoded.get((self._number, key), {})

    def _quantize_unit(self, unit: str, states: States, meter: Meter) -> list[MatrixFigures]:
        """Quantizes linears of attention, dense MLP or shared experts, on the first rank, for all of them."""
        import torch

        names = self._made_names(unit)
        if not names:
            return []
        figures: list[MatrixFigures] = []
        wide = self._model.read(_wide({name: self._units[unit][name] for name in names}))
        for tapped, linears in STAGES[unit]:
            chosen = {name: names[name] for name in linears if name in names}
            if not chosen or tapped not in self._units[unit]:
                continue
            memory = self._new_memory(chosen)
            _refuse_nonfinite(
                self._units[unit], {name: (~torch.isfinite(wide[name])).sum() for name in chosen}
            )
            if self._ranks.rank == 0:
                seen = self._look(unit, tapped, wide[next(iter(chosen))].shape[1], states)
                weights = {name: wide[name] for name in chosen}
                memory, found = quantize_stage(_prefix(chosen), weights, _formats(chosen), seen, self._recipe)
                figures += found
            self._ranks.broadcast_(memory.flat, 0)
            self._memories[unit, tapped] = memory, chosen
            quantized = decode(_encoded(memory, chosen), self._model.dtype)
            self._resident.decoded[self._number, unit].update(quantized)
            meter.add(_source_nbytes(chosen))
        return figures

    def _look(self, unit: str, tapped: str, size: int, states: States) -> Seen:
        """Returns the inputs of a linear, over all blocks."""
        seen = Seen(tapped, size, self._device)
        layer = self._model.layer(self._number, self._resident, tap=seen.tap)
        for rows in states.blocks():
            self._place.stop.check()
            seen.gram = seen.train if rows.stop <= states.split else seen.held_out
            block = states.block(rows)
            if unit == "attention":
                layer.attention_all([block])
            else:
                gated_mlp(layer.normed(block), self._resident.decoded[self._number, unit], seen.tap)
        return seen

    def _route(self, states: States) -> Routes:
        """Returns the routes of all tokens."""
        import torch

        layer = self._model.layer(self._number, self._resident)
        found = [layer.route(states.block(rows)) for rows in states.blocks()]
        return Routes(*(torch.cat(values) for values in zip(*found, strict=True)))

    def _quantize_experts(self, states: States, routes: Routes, meter: Meter) -> Found:
        """Quantizes all routed experts, each on one rank, for all of them."""
        layer = self._model.layer(self._number, self._resident)
        length, hidden = states.values_BLD.shape[1:]
        count = len(self._experts)
        inputs = LayerInputs(layer, states, routes, states.split * length, count)
        loads = [inputs.counts(expert) + 4.0 * hidden for expert in range(count)]
        shares = spread(loads, self._ranks.world_size)
        mine = [Order(expert, _wide(self._units[expert])) for expert in shares[self._ranks.rank]]
        results: dict[int, ExpertResult] = {}

        def work(item: tuple[int, Mapping[str, Tensor]]) -> None:
            expert, taken = item
            self._place.stop.check()
            names = self._made_names(expert)
            results[expert] = quantize_expert(expert, taken, _formats(names), inputs, self._recipe)
            meter.add(_source_nbytes(names))

        with self._model.reading(mine) as weights:
            experts = ((int(str(one.key)), weights.take(one.key, one.unit)) for one in mine)
            in_parallel(experts, work, self._device, self._ranks.processes_here)
        for expert, result in results.items():
            _refuse_nonfinite(self._units[expert], result.nonfinite)
        owners = {expert: rank for rank, share in enumerate(shares) for expert in share}
        for expert in self._experts:
            names = self._made_names(expert)
            memory = results[expert].memory if expert in results else self._new_memory(names)
            self._ranks.broadcast_(memory.flat, owners[expert])
            self._keep(expert, memory, names)
        known = {
            expert: ([one.figures() for one in result.measured], [float(one) for one in result.output_error])
            for expert, result in results.items()
        }
        together = {key: value for part in self._place.ranks.agree(known) for key, value in part.items()}
        figures = [one for expert in self._experts for one in together[expert][0]]
        errors, signals = zip(*(together[expert][1] for expert in self._experts), strict=True)
        return figures, tuple(inputs.train_counts), (sum(errors), sum(signals))

    def _keep_stored_experts(self) -> None:
        """Keeps experts that are not quantized as the source stores them."""
        for expert in self._experts:
            if (self._number, expert) in self._resident.encoded:
                continue
            stored = {name: self._model.stored(wanted.name) for name, wanted in self._units[expert].items()}
            self._resident.encoded[self._number, expert] = {
                name: (fmt, {part: one.read(tensor, device=self._device) for part, tensor in parts.items()})
                for name, (one, fmt, parts) in stored.items()
            }

    def _new_memory(self, names: Mapping[str, Step]) -> Memory:
        shapes = {name: step.shape for name, step in names.items()}
        return Memory(_formats(names), shapes, self._device)

    def _keep(self, key: Hashable, memory: Memory, names: Mapping[str, Step]) -> None:
        self._memories[key] = memory, names
        self._resident.encoded[self._number, key] = _encoded(memory, names)


def _refuse_nonfinite(unit: Unit, counts: Mapping[str, Tensor]) -> None:
    """Refuses weights that no code stands for.

    Raises:
        CheckpointError: with the first one's name.
    """
    for name, count in counts.items():
        if int(count):
            raise CheckpointError(
                f"{unit[name].name}: {int(count)} elements are NaN or infinite, expected finite weights (a "
                "damaged checkpoint?); a calibrated run cannot go on over them"
            )


def _part(order: Order) -> Hashable:
    """Returns which part of its layer a unit is."""
    assert isinstance(order.key, tuple)
    part: Hashable = order.key[1]
    return part


def _wide(unit: Unit) -> dict[str, Wanted]:
    return {name: replace(wanted, is_wide=True) for name, wanted in unit.items()}


def _formats(names: Mapping[str, Step]) -> dict[str, Format]:
    return {name: step.target for name, step in names.items() if step.target is not None}


def _encoded(memory: Memory, names: Mapping[str, Step]) -> dict[str, tuple[Format, Mapping[str, Tensor]]]:
    return {name: (fmt, memory.parts[name]) for name, fmt in _formats(names).items()}


def _prefix(names: Mapping[str, Step]) -> str:
    """Returns "self_attn", "mlp" or "mlp.shared_experts"."""
    name = next(iter(names.values())).weight.name
    return name.split(".", 3)[3].rsplit(".", 2)[0]


def _source_nbytes(names: Mapping[str, Step]) -> int:
    return sum(spec.nbytes for step in names.values() for spec in step.input_specs(step.shape).values())
