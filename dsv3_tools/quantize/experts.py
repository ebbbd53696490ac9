"""The routed experts of one layer, one at a time: gate and up on their inputs, then down on what these make.

An expert is quantized from its own tokens alone, each counting by the square of its route's weight, which is
how its error counts in the layer's output. With few tokens their mean is drawn towards that of the whole
layer: for down, of what the quantized gate and up make of a sample of the layer's tokens.

Shape suffixes: T tokens, D hidden, I intermediate, E experts.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3_tools.formats import Format
from dsv3_tools.model.layer import Layer
from dsv3_tools.model.mlp import MLP_PARTS, activation
from dsv3_tools.model.moe import Assignment, Routes, assign
from dsv3_tools.quantize.coding import Memory, baseline, grid_of, store
from dsv3_tools.quantize.figures import Measured
from dsv3_tools.quantize.gram import Gram, shrink
from dsv3_tools.quantize.matrix import Coded, factorize, quantize_matrix
from dsv3_tools.quantize.recipe import Recipe
from dsv3_tools.quantize.resident import decode
from dsv3_tools.quantize.states import States

if TYPE_CHECKING:
    from torch import Tensor

Chunk = tuple["Tensor", "Tensor"]

__all__ = ["DOWN_SAMPLE", "ExpertResult", "LayerInputs", "quantize_expert", "spread"]

_CHUNK = 16384
"""Tokens of an expert whose inputs are in memory together."""

_SAMPLE = 32768
"""Tokens of a layer that stand for all of them."""

DOWN_SAMPLE = 8192
"""Those of them whose activations every expert computes as well."""


class LayerInputs:
    """What a layer's experts get: hidden states after attention, not yet normalised, and routes.

    Args:
        layer: whose norm is applied.
        states: of all tokens.
        routes: of all tokens.
        num_train: tokens that Hessians are of; those after them are held out.
        num_experts: routed ones.
    """

    def __init__(
        self, layer: Layer, states: States, routes: Routes, num_train: int, num_experts: int
    ) -> None:
        import torch

        self._layer = layer
        self._states = states
        self._assignment: Assignment = assign(routes, num_experts)
        counts_E = torch.bincount(routes.indices[:num_train].flatten(), minlength=num_experts)
        self.train_counts: list[int] = counts_E.tolist()
        step = max(1, -(-num_train // _SAMPLE))
        sample_T = torch.arange(0, num_train, step, device=states.device)
        self.sample_TD = layer.normed(states.rows(sample_T))
        self.gram = Gram(self.sample_TD.shape[1], states.device)
        self.gram.add(self.sample_TD)

    def counts(self, expert: int) -> int:
        """Returns how many tokens an expert gets, held out or not."""
        of = self._assignment.of(expert)
        return int(of.stop - of.start)

    def train(self, expert: int) -> _Chunks:
        """Returns an expert's inputs and their weights, those for Hessians."""
        of = self._assignment.of(expert)
        return _Chunks(self._read, of.start, of.start + self.train_counts[expert])

    def held_out(self, expert: int) -> _Chunks:
        """Returns the other ones."""
        of = self._assignment.of(expert)
        return _Chunks(self._read, of.start + self.train_counts[expert], of.stop)

    def _read(self, part: slice) -> Chunk:
        x_TD = self._layer.normed(self._states.rows(self._assignment.tokens[part]))
        return x_TD, self._assignment.weights[part].square()


class _Chunks:
    """Inputs `[T, D]` with the squares of their routes' weights `[T, 1]`, in chunks, as often as asked.

    One chunk alone is kept; several are read again each time.
    """

    def __init__(self, read: Callable[[slice], Chunk], start: int, stop: int) -> None:
        self._read = read
        self._parts = [slice(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]
        self._kept = [read(part) for part in self._parts] if len(self._parts) == 1 else None
        self.count = stop - start

    def __iter__(self) -> Iterator[Chunk]:
        yield from self._kept if self._kept is not None else map(self._read, self._parts)


@dataclass(frozen=True)
class ExpertResult:
    """A quantized expert: its parts, and what is known of it.

    `nonfinite` counts elements of the weights that are NaN or infinite, on the device; there should be none.
    """

    memory: Memory
    measured: tuple[Measured, ...]
    nonfinite: Mapping[str, Tensor]
    output_error: tuple[Tensor, Tensor]


def quantize_expert(
    expert: int,
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Format],
    inputs: LayerInputs,
    recipe: Recipe,
) -> ExpertResult:
    """Quantizes gate and up, then down on what the quantized ones make of the inputs.

    Args:
        expert: its number.
        weights: `gate_proj`, `up_proj`, `down_proj`, float32.
        formats: of each.
        inputs: of the layer.
        recipe: what is done.
    """
    import torch

    gate, up, down = MLP_PARTS
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    device = weights[gate].device
    memory = Memory(formats, shapes, device)
    dtype = inputs.sample_TD.dtype
    train, held = inputs.train(expert), inputs.held_out(expert)

    both_ID = torch.cat([weights[gate], weights[up]])
    own = Gram(both_ID.shape[1], device)
    for x_TD, counts_T1 in train:
        own.add(x_TD, counts_T1)
    coded = _quantize(both_ID, shrink(own, inputs.gram), formats[gate], recipe)
    width = shapes[gate][0]
    store(formats[gate], coded, slice(0, width), memory.parts[gate])
    store(formats[up], coded, slice(width, None), memory.parts[up])
    quantized = decode({name: (formats[name], memory.parts[name]) for name in (gate, up)}, dtype)
    both = torch.cat([quantized[gate], quantized[up]])
    first = _figures(f"experts.{expert}.gate_up", own.tokens, held, both_ID, both, formats[gate], coded)

    below = Gram(width, device)
    for x_TD, counts_T1 in train:
        below.add(activation(x_TD, quantized), counts_T1)
    around = Gram(width, device)
    around.add(activation(_some(inputs.sample_TD), quantized))
    coded = _quantize(weights[down], shrink(below, around), formats[down], recipe)
    store(formats[down], coded, slice(None), memory.parts[down])
    quantized |= decode({down: (formats[down], memory.parts[down])}, dtype)
    made = ((activation(x_TD, quantized), counts_T1) for x_TD, counts_T1 in held)
    name = f"experts.{expert}.down_proj"
    second = _figures(name, below.tokens, made, weights[down], quantized[down], formats[down], coded)
    nonfinite = {name: (~torch.isfinite(weight)).sum() for name, weight in weights.items()}
    return ExpertResult(memory, (first, second), nonfinite, _output_error(weights, quantized, held))


def spread(loads: Sequence[float], world_size: int) -> list[list[int]]:
    """Returns each rank's experts: the heaviest first, always to the rank with the least."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    filled = [0.0] * world_size
    for expert in sorted(range(len(loads)), key=lambda one: (-loads[one], one)):
        rank = filled.index(min(filled))
        shares[rank].append(expert)
        filled[rank] += loads[expert]
    return [sorted(share) for share in shares]


def _quantize(weight_NK: Tensor, hessian_KK: Tensor, fmt: Format, recipe: Recipe) -> Coded:
    factor = factorize(hessian_KK, recipe.damping) if recipe.method == "gptq" else None
    return quantize_matrix(weight_NK, hessian_KK, grid_of(fmt, weight_NK.shape[1]), factor)


def _some(sample_TD: Tensor) -> Tensor:
    step = max(1, -(-len(sample_TD) // DOWN_SAMPLE))
    return sample_TD[::step]


def _figures(
    name: str,
    tokens: int,
    held: Iterable[Chunk],
    weight_NK: Tensor,
    quantized_NK: Tensor,
    fmt: Format,
    coded: Coded,
) -> Measured:
    """Returns how far off a weight's outputs are for tokens that were held out."""
    import torch

    from dsv3_tools.model.numerics import linear_wide

    error = absmax_error = signal = torch.zeros((), dtype=torch.float64, device=weight_NK.device)
    plain, dtype = baseline(fmt), quantized_NK.dtype
    count, rounded_NK, original_NK = 0, None, weight_NK.to(dtype)
    for x_TK, counts_T1 in held:
        if rounded_NK is None:
            rounded_NK = decode({"": (plain, plain.encode(weight_NK))}, dtype)[""]
        right_TN = linear_wide(x_TK, original_NK)
        signal = signal + _weighted(right_TN, counts_T1)
        error = error + _weighted(right_TN - linear_wide(x_TK, quantized_NK), counts_T1)
        absmax_error = absmax_error + _weighted(right_TN - linear_wide(x_TK, rounded_NK), counts_T1)
        count += len(x_TK)
    sums = error, absmax_error, signal
    return Measured(name, weight_NK.shape[1], tokens, count, sums, coded.predicted_gain, coded.damping)


def _output_error(
    weights: Mapping[str, Tensor],
    quantized: Mapping[str, Tensor],
    held: Iterable[Chunk],
) -> tuple[Tensor, Tensor]:
    """Returns the squared error of a whole expert's weighted outputs, and their squares."""
    import torch

    from dsv3_tools.model.mlp import gated_mlp

    device = next(iter(weights.values())).device
    error = signal = torch.zeros((), dtype=torch.float64, device=device)
    original = {name: weight.to(quantized[name].dtype) for name, weight in weights.items()}
    for x_TD, counts_T1 in held:
        right_TD = gated_mlp(x_TD, original)
        error = error + _weighted(right_TD - gated_mlp(x_TD, quantized), counts_T1)
        signal = signal + _weighted(right_TD, counts_T1)
    return error, signal


def _weighted(values_TN: Tensor, counts_T1: Tensor) -> Tensor:
    return (values_TN.square().sum(1, keepdim=True) * counts_T1).double().sum()
