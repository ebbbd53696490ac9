"""What a format is: how one weight is stored, as named parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[str, Tensor]

__all__ = ["Format", "check_parts"]


class Format(ABC):
    """How one weight is stored.

    A format is a frozen dataclass: equal parameters, equal format. Its *parts* are named by the last
    part of their tensor's name ("weight", "weight_scale_inv"). It knows shapes, bytes and arithmetic;
    it knows neither files nor layers nor full names.
    """

    name: str

    @property
    @abstractmethod
    def row_alignment(self) -> int:
        """Rows that must stay together: a stripe that starts at a multiple of it is coded alone."""

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns the specs of the tensors that store a weight of `shape`.

        Raises:
            FormatError: no weight of this shape can be stored so.
        """

    @abstractmethod
    def decode_into(self, items: Sequence[Parts], outs: Sequence[Tensor]) -> Tensor:
        """Writes the weights that `items` store into `outs`; returns int32 counts of non-finite elements.

        The items are a group that a GPU handles in one launch. `outs` are all BF16 or all float32.
        """

    @abstractmethod
    def encode_into(self, weights: Sequence[Tensor], outs: Sequence[Parts]) -> Tensor:
        """Writes `weights` into the parts `outs`; returns int32 counts of non-finite elements read."""

    def quantization_config(self) -> dict[str, Any] | None:
        """Returns what `config.json` says of weights in this format; None for unquantized ones."""
        return None

    def decode(self, parts: Parts, *, dtype: str = "BF16") -> Tensor:
        """Returns the weight that `parts` store, rounded once to `dtype` ("BF16" or "F32").

        Raises:
            FormatError: the parts are not those of one weight in this format.
        """
        import torch

        shape = check_parts(self, parts)
        out = torch.empty(shape, dtype=torch_dtype(dtype), device=parts["weight"].device)
        self.decode_into([parts], [out])
        return out

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the parts that store `weight` (BF16, F16 or F32).

        Raises:
            FormatError: no weight of this shape can be stored so.
        """
        import torch

        specs = self.parts(tuple(weight.shape))
        out = {
            part: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=weight.device)
            for part, spec in specs.items()
        }
        self.encode_into([weight.contiguous()], [out])
        return out


def check_parts(fmt: Format, parts: Parts) -> tuple[int, ...]:
    """Returns the shape of the weight that `parts` store, having compared every part's spec.

    Raises:
        FormatError: a part is missing, unknown or of another dtype or shape.
    """
    if "weight" not in parts:
        raise FormatError(f"{fmt.name}: no part 'weight' among {sorted(parts)}")
    shape = tuple(parts["weight"].shape)
    expected = fmt.parts(shape)
    if expected.keys() != parts.keys():
        raise FormatError(f"{fmt.name}: got the parts {sorted(parts)}, expected {sorted(expected)}")
    for part, spec in expected.items():
        tensor = parts[part]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != torch_dtype(spec.dtype):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise FormatError(f"{fmt.name}: {part} is {found}, expected {spec} for a weight {list(shape)}")
    return shape
