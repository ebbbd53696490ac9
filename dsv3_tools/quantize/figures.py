"""What calibration says of every layer: how far off, what was gained, on how many tokens.

Errors are those of outputs, relative: the squares of what is wrong over the squares of what is right. "Held
out" are tokens that no Hessian has seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LayerFigures", "MatrixFigures", "Measured"]


@dataclass(frozen=True)
class MatrixFigures:
    """One weight, or gate and up projections together.

    Attributes:
        name: "experts.7.gate_up", "self_attn.o_proj".
        inputs: of the weight.
        tokens: that its Hessian has seen.
        held_out_tokens: that the errors are of.
        error: squared, of the held-out outputs.
        absmax_error: the same, rounded to the nearest code with scales of the largest weight.
        signal: of the outputs.
        predicted_gain: what the Hessian promises against rounding alone, as a ratio.
        damping: of the Hessian; None where nothing was made up for, because it had no factor or by request.
    """

    name: str
    inputs: int
    tokens: int
    held_out_tokens: int
    error: float
    absmax_error: float
    signal: float
    predicted_gain: float
    damping: float | None


@dataclass(frozen=True)
class Measured:
    """What becomes `MatrixFigures` when the device is done: nobody waits for it before.

    Attributes:
        sums: error, absmax error and signal, each a number on the device.
    """

    name: str
    inputs: int
    tokens: int
    held_out_tokens: int
    sums: tuple[Tensor, Tensor, Tensor]
    predicted_gain: Tensor
    damping: float | None

    def figures(self) -> MatrixFigures:
        """Returns the numbers."""
        error, absmax_error, signal = (float(one) for one in self.sums)
        return MatrixFigures(
            self.name,
            self.inputs,
            self.tokens,
            self.held_out_tokens,
            error,
            absmax_error,
            signal,
            float(self.predicted_gain),
            self.damping,
        )


@dataclass(frozen=True)
class LayerFigures:
    """One layer.

    Attributes:
        number: of the layer.
        matrices: all that were quantized.
        expert_tokens: of every routed expert, the tokens that its Hessian has seen; empty without experts.
        output_error: squared, of what the quantized experts add to held-out tokens, and its signal.
    """

    number: int
    matrices: tuple[MatrixFigures, ...]
    expert_tokens: tuple[int, ...] = ()
    output_error: tuple[float, float] = field(default=(0.0, 0.0))

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> LayerFigures:
        """Returns the figures of a file that `dataclasses.asdict` was written to."""
        matrices = tuple(MatrixFigures(**entry) for entry in document["matrices"])
        return cls(
            document["number"],
            matrices,
            tuple(document["expert_tokens"]),
            (document["output_error"][0], document["output_error"][1]),
        )
