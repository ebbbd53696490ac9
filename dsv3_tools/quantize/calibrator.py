"""Quantizes a model layer by layer, and runs the quantized layer to get the inputs of the next.

All hidden states go through attention and router once; then the layer's weights are quantized, the experts
one at a time; then the hidden states go through what has been written, so that later layers make up for
earlier ones. Nothing is kept of a layer but its hidden states. Ranks divide experts by their tokens, and
blocks of sequences; what they compute does not depend on who does.


Shape suffixes: B sequences, L tokens of a sequence.
"""
# ruff: noqa: N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.manifest import QUANTIZATION_NAME
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.making import Made, MadeWeights, Place, made_shard
from dsv3_tools.conversion.plan import Plan, ShardPlan, Step
from dsv3_tools.conversion.progress import Meter
from dsv3_tools.conversion.quantization import is_made
from dsv3_tools.errors import DestinationError
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.model.settings import Settings
from dsv3_tools.model.transformer import Transformer
from dsv3_tools.quantize.arithmetic import check_finite, deterministic, memory_errors
from dsv3_tools.quantize.figures import LayerFigures
from dsv3_tools.quantize.forecast import forecast, measure
from dsv3_tools.quantize.host import HostBuffers
from dsv3_tools.quantize.layer_work import LayerWork
from dsv3_tools.quantize.plan_facts import made_steps, matrices, shards_of_layers
from dsv3_tools.quantize.progress import (
    load_figures,
    load_states,
    save_figures,
    save_states,
    saved_layers,
)
from dsv3_tools.quantize.recipe import Recipe
from dsv3_tools.quantize.report import encode_report
from dsv3_tools.quantize.states import States, choose_place
from dsv3_tools.quantize.tokens import Calibration

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Calibrator"]

_EMBEDDED_AT_ONCE = 1 << 17
"""Tokens for which the rows of the embedding are read together."""


@dataclass(frozen=True)
class Calibrator:
    """Makes the weights of a calibrated plan; see `making.Maker`.

    Attributes:
        plan: with steps that `is_made` is true of.
        checkpoint: the source, open.
        calibration: tokens.
        recipe: what is done.
        dtype: "F32" or "BF16", of the forward pass.
        memory: bytes of memory that hidden states may take; None is a part of what is free.
        save_every: layers after which hidden states are saved.
        world_size: ranks of the run.
    """

    plan: Plan
    checkpoint: Checkpoint
    calibration: Calibration
    recipe: Recipe
    dtype: str
    memory: int | None = None
    save_every: int = 4
    world_size: int = 1

    @property
    def states_nbytes(self) -> int:
        """Bytes of the hidden states of all tokens."""
        settings = Settings.from_json(self.checkpoint.config_json, self.checkpoint.where(CONFIG_NAME))
        width = 2 if self.dtype == "BF16" else 4
        return self.calibration.tokens_BL.numel() * settings.dims.hidden_size * width

    @property
    def scratch_nbytes(self) -> int:
        """Hidden states as they are saved, those saved before, and a mapped file of each rank."""
        return (2 + self.world_size) * self.states_nbytes

    @cached_property
    def layers(self) -> dict[int, dict[str, Step]]:
        """The steps whose codes are made, by layer and by the weight's name."""
        return made_steps(self.plan)

    def forecast(self, device: str, world_size: int) -> Mapping[str, Any]:
        """Returns what a run will take; see `forecast.Forecast`."""
        import torch

        from dsv3_tools.model.numerics import compute_dtype

        where, weights = torch.device(device), matrices(self.layers)
        with deterministic(where), torch.no_grad():
            speeds = measure(where, compute_dtype(self.dtype), max(one.columns for one in weights))
        dims = self.checkpoint.config
        found = forecast(
            dims,
            weights=weights,
            num_layers=len(dims.main_layers) + len([n for n in self.layers if n not in dims.main_layers]),
            tokens=self.calibration.tokens_BL.numel(),
            states_place=choose_place(self.states_nbytes, where, self.memory, 1),
            value_nbytes=2 if self.dtype == "BF16" else 4,
            disk_nbytes=self.plan.nbytes_in + self.plan.nbytes_out,
            speeds=speeds,
            is_gptq=self.recipe.method == "gptq",
            world_size=world_size,
            device_type=where.type,
        )
        more = {"tokens": self.calibration.source, "scratch_nbytes": self.scratch_nbytes}
        return {**asdict(found), **more}

    def make(self, missing: Sequence[ShardPlan], place: Place) -> Generator[Made]:
        """Yields the missing shards, layer by layer; see `making.Maker`."""
        import torch

        names = {shard.name for shard in missing}
        plain = [shard for shard in missing if not any(map(is_made, shard.steps))]
        if plain:
            yield Made(plain)
        if len(plain) == len(missing):
            return
        device = torch.device(place.device)
        with deterministic(device), torch.no_grad(), memory_errors(place.device):
            ranks = RankGroup.join(device)
            if place.ranks.is_first:
                place.folder.mkdir(exist_ok=True)
            place.ranks.agree()
            yield from _Run(self, place, ranks, device, names).batches()

    def files(self, place: Place) -> dict[str, bytes]:
        """Returns the report of all layers."""
        found = load_figures(place.folder, self.layers)
        if lost := [number for number in self.layers if number not in found]:
            raise DestinationError(
                f"{place.folder}: the figures of {len(lost)} layers are gone (first: {lost[0]}); "
                "--overwrite begins anew"
            )
        return {QUANTIZATION_NAME: encode_report(self._record(), found)}

    def _record(self) -> Mapping[str, object]:
        return {
            "operation": self.plan.operation,
            "recipe": dict(self.recipe.record()),
            "calibration": dict(self.calibration.record()),
        }


class _Run:
    """One pass through the layers."""

    def __init__(
        self, made: Calibrator, place: Place, ranks: RankGroup, device: torch.device, missing: set[str]
    ) -> None:
        self._made = made
        self._place = place
        self._ranks = ranks
        self._device = device
        self._missing = missing
        self._steps = made.layers
        self._shards = shards_of_layers(made.plan)
        self._model = Transformer(made.checkpoint, device=device, dtype=made.dtype, through_bf16=True)
        self._model.check()
        self._figures = load_figures(place.folder, self._steps)
        self._where = choose_place(made.states_nbytes, device, made.memory, ranks.processes_here)
        nbytes = sum(self._source_nbytes(number) for number in self._steps)
        self._host = HostBuffers(device)
        self._meter = Meter(nbytes // ranks.world_size, len(self._steps), place.on_progress)

    def batches(self) -> Iterator[Made]:
        """Yields the shards of every layer, and saves hidden states between them."""
        with self._model.keeping_readers():
            yield from self._all_layers()

    def _all_layers(self) -> Iterator[Made]:
        main = self._model.settings.dims.num_hidden_layers
        last = max(self._steps)
        first, states = self._begin()
        for number in range(first, min(main, last + 1)):
            yield from self._layer(number, states)
            following = number + 1
            if following % self._made.save_every == 0 and following < min(main, last + 1):
                yield Made()
                self._place.ranks.agree()  # what the others write is on disk as well
                self._save(following, states)
        for index, number in enumerate(self._model.mtp_layers):
            if any(later >= number for later in self._steps):
                states = self._mtp_input(index, states)
                yield from self._layer(number, states)

    def _begin(self) -> tuple[int, States]:
        """Returns the layer to begin with, and the hidden states before it."""
        tokens_BL = self._made.calibration.tokens_BL
        shape = (*tokens_BL.shape, self._model.settings.dims.hidden_size)
        states = States.make(
            shape,
            self._model.dtype,
            place=self._where,
            folder=self._place.folder,
            device=self._device,
            ranks=self._ranks,
            split=self._made.calibration.num_train,
        )
        first = self._place.ranks.agree(self._first_layer())[0]  # one rank's view of the files, for all
        if first:
            load_states(self._place.folder, first, states.values_BLD)
            for layer in self._steps:
                if layer < first:
                    self._meter.add(self._source_nbytes(layer), shards=1)
            return first, states
        step = max(1, _EMBEDDED_AT_ONCE // tokens_BL.shape[1])
        for start in range(0, len(tokens_BL), step):
            rows = slice(start, start + step)
            states.values_BLD[rows].copy_(self._model.embed(tokens_BL[rows]))
        return 0, states

    def _first_layer(self) -> int:
        """Returns the last layer before which hidden states are saved and all is written; 0 without any."""
        for number in saved_layers(self._place.folder):
            if all(self._is_done(layer) for layer in self._steps if layer < number):
                return number
        return 0

    def _mtp_input(self, index: int, states: States) -> States:
        """Returns what an MTP layer gets: the states of the layer before, and the tokens that come next."""
        mtp = self._model.mtp(index)
        (joining,) = mtp.orders()
        join = mtp.join(self._model.read(joining.unit))
        next_BL = self._made.calibration.tokens_BL[:, index + 1 :]

        def change(rows: slice) -> Tensor:
            (joined,) = join([states.block(rows)[:, :-1].contiguous()], next_BL[rows])
            return joined

        return states.shortened(change)

    def _layer(self, number: int, states: States) -> Iterator[Made]:
        """Yields the shards of a layer, then takes the hidden states through it."""
        steps = self._steps.get(number, {})
        work = self._work(number)
        loaded = bool(steps) and self._is_done(number) and work.load(self._shards[number])
        if all(self._place.ranks.agree(loaded)):
            work.forward(states)
            self._meter.add(self._source_nbytes(number))
        else:
            work = self._work(number) if loaded else work
            matrices, expert_tokens, output_error = work.quantize(states, self._meter)
            if steps:
                figures = LayerFigures(number, tuple(matrices), expert_tokens, output_error)
                if self._place.ranks.is_first:
                    save_figures(self._place.folder, figures)
                shards = [shard for shard in self._shards.get(number, ()) if shard.name in self._missing]
                own = [shard for shard in shards if shard.name in self._place.own]
                names = {name for shard in own for name in shard.specs()}
                yield Made(
                    [made_shard(shard, is_made) for shard in shards],
                    MadeWeights(work.made_parts(self._host, names)),
                )
        check_finite(states, number)
        if steps:
            self._meter.add(0, shards=1)

    def _is_done(self, number: int) -> bool:
        """Whether an earlier run has written all of a layer."""
        written = all(shard.name not in self._missing for shard in self._shards[number])
        return written and number in self._figures

    def _work(self, number: int) -> LayerWork:
        steps = self._steps.get(number, {})
        return LayerWork(self._model, number, steps, self._made.recipe, self._place, self._ranks)

    def _source_nbytes(self, number: int) -> int:
        steps = self._steps[number].values()
        return sum(spec.nbytes for step in steps for spec in step.input_specs(step.shape).values())

    def _save(self, number: int, states: States) -> None:
        if self._place.ranks.is_first:
            save_states(self._place.folder, number, states.values_BLD)
        self._place.ranks.agree()
