"""What a format is: how one weight is stored, as named parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

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
    weight_part: ClassVar[str] = "weight"
    """The part that holds the elements or their codes; its tensor's name is the weight's in messages."""

    @property
    @abstractmethod
    def code_dtype(self) -> str:
        """Element type of `weight_part`."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of all parts."""
        return tuple(self.parts((128, 128)))

    @property
    def scale_part(self) -> str | None:
        """The part that holds the scales, each finite and positive; None without scales."""
        return None

    @property
    @abstractmethod
    def row_alignment(self) -> int | None:
        """Rows that must stay together: a stripe that starts at a multiple of it is coded alone.

        None where the parts are not stored row by row: such a weight is only coded whole.
        """

    @abstractmethod
    def shape_of(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the weight whose `weight_part` has `code_shape`.

        Raises:
            FormatError: no weight's codes have this shape.
        """

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns the specs of the tensors that store a weight of `shape`.

        Raises:
            FormatError: no weight of this shape can be stored so.
        """

    def fixed(self, shape: tuple[int, ...]) -> dict[str, bytes]:  # noqa: ARG002
        """Returns the content of the parts that follow from the shape alone; nobody decodes them."""
        return {}

    def fitted(self, specs: Mapping[str, TensorSpec]) -> Format:  # noqa: ARG002
        """Returns the variant of this format that has parts of these dtypes, where config.json is silent."""
        return self

    def same_bytes(self, other: Format) -> bool:
        """Whether every weight's parts, in order, have the same bytes in both formats."""
        return self == other

    @abstractmethod
    def decode_into(self, items: Sequence[Parts], outs: Sequence[Tensor]) -> Tensor:
        """Writes the weights that `items` store into `outs`; returns int32 counts of non-finite elements.

        The items are a group that a GPU handles in one launch. `outs` are all BF16 or all float32.
        """

    @abstractmethod
    def encode_into(self, weights: Sequence[Tensor], outs: Sequence[Parts]) -> Tensor:
        """Writes `weights` into the parts `outs`; returns int32 counts of non-finite elements read."""

    def decode(self, parts: Parts, *, dtype: str = "BF16") -> Tensor:
        """Returns the weight that `parts` store, rounded once to `dtype` ("BF16" or "F32").

        Raises:
            FormatError: the parts are not those of one weight in this format.
        """
        import torch

        shape = check_parts(self, parts)
        out = torch.empty(shape, dtype=torch_dtype(dtype), device=parts[self.weight_part].device)
        self.decode_into([parts], [out])
        return out

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the parts that store `weight` (BF16, F16 or F32).

        Raises:
            FormatError: no weight of this shape can be stored so.
        """
        import torch

        shape = tuple(weight.shape)
        specs = self.parts(shape)
        out = {
            part: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=weight.device)
            for part, spec in specs.items()
        }
        for part, content in self.fixed(shape).items():
            known = torch.frombuffer(bytearray(content), dtype=torch_dtype(specs[part].dtype))
            out[part].copy_(known.reshape(specs[part].shape))
        self.encode_into([weight.contiguous()], [out])
        return out


def check_parts(fmt: Format, parts: Parts) -> tuple[int, ...]:
    """Returns the shape of the weight that `parts` store, having compared every part's spec.

    Raises:
        FormatError: a part is missing, unknown or of another dtype or shape.
    """
    if fmt.weight_part not in parts:
        raise FormatError(f"{fmt.name}: no part {fmt.weight_part!r} among {sorted(parts)}")
    shape = fmt.shape_of(tuple(parts[fmt.weight_part].shape))
    expected = fmt.parts(shape)
    if expected.keys() != parts.keys():
        raise FormatError(f"{fmt.name}: got the parts {sorted(parts)}, expected {sorted(expected)}")
    for part, spec in expected.items():
        tensor = parts[part]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != torch_dtype(spec.dtype):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise FormatError(f"{fmt.name}: {part} is {found}, expected {spec} for a weight {list(shape)}")
    return shape
