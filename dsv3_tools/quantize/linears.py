"""A layer's other linears: attention, dense MLP, shared experts, each on what those before it make.

Linears with the same input share a Hessian. What they get is seen by a tap on the forward pass, over all
blocks of hidden states, with those before them quantized already.

Shape suffixes: T tokens, K inputs, N outputs.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsv3_tools.formats import Format
from dsv3_tools.quantize.coding import Memory, baseline, grid_of, store
from dsv3_tools.quantize.figures import MatrixFigures
from dsv3_tools.quantize.gram import Gram
from dsv3_tools.quantize.matrix import factorize, quantize_matrix
from dsv3_tools.quantize.recipe import Recipe
from dsv3_tools.quantize.resident import decode

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["STAGES", "Seen", "quantize_stage"]

STAGES: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "attention": (
        ("q_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
        ("q_proj", ("q_proj", "kv_a_proj_with_mqa")),
        ("q_b_proj", ("q_b_proj",)),
        ("kv_b_proj", ("kv_b_proj",)),
        ("o_proj", ("o_proj",)),
    ),
    "mlp": (("gate_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))),
}
"""Per unit, in the order of the computation: the name that a tap has for an input, and who gets it."""


class Seen:
    """The inputs of one linear: those for the Hessian, and those held out.

    Attributes:
        gram: the one of the two that inputs are now added to.
    """

    def __init__(self, name: str, size: int, device: torch.device) -> None:
        self._name = name
        self.train, self.held_out = Gram(size, device), Gram(size, device)
        self.gram = self.train

    def tap(self, name: str, x_TK: Tensor) -> None:
        """Adds the input of a linear, if it is this one; see `mlp.Tap`."""
        if name == self._name:
            self.gram.add(x_TK)


def quantize_stage(
    prefix: str,
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Format],
    seen: Seen,
    recipe: Recipe,
) -> tuple[Memory, list[MatrixFigures]]:
    """Quantizes linears that share an input.

    Args:
        prefix: of their names in the figures.
        weights: by name, float32.
        formats: of each.
        seen: their inputs.
        recipe: what is done.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    hessian_KK = seen.train.mean()
    memory = Memory(formats, shapes, hessian_KK.device)
    factor = factorize(hessian_KK, recipe.damping) if recipe.method == "gptq" else None
    figures = []
    for name, weight_NK in weights.items():
        fmt = formats[name]
        coded = quantize_matrix(weight_NK, hessian_KK, grid_of(fmt, weight_NK.shape[1]), factor)
        store(fmt, coded, slice(None), memory.parts[name])
        quantized_NK = decode({name: (fmt, memory.parts[name])}, weight_NK.dtype)[name]
        plain = baseline(fmt)
        rounded_NK = decode({name: (plain, plain.encode(weight_NK))}, weight_NK.dtype)[name]
        figures.append(
            MatrixFigures(
                f"{prefix}.{name}",
                weight_NK.shape[1],
                seen.train.tokens,
                seen.held_out.tokens,
                _output_squares(quantized_NK - weight_NK, seen.held_out),
                _output_squares(rounded_NK - weight_NK, seen.held_out),
                _output_squares(weight_NK, seen.held_out),
                float(coded.predicted_gain),
                coded.damping,
            )
        )
    return memory, figures


def _output_squares(weight_NK: Tensor, gram: Gram) -> float:
    """Returns the squares of what a weight makes of all inputs."""
    return float(((weight_NK @ gram.sum_KK) * weight_NK).sum(dtype=weight_NK.dtype)) if gram.tokens else 0.0
