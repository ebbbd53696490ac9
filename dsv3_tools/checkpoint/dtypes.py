"""The element types of safetensors files: size, rank in a file, torch's name.

Source: safetensors' `Dtype` enum (0.8). Its order is the order of tensors in a file: largest rank
first, then by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dsv3_tools.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "FLOAT_DTYPES", "DType", "torch_dtype"]


class DType(NamedTuple):
    """One element type: bits per element, rank in a file's order, torch's attribute name."""

    bits: int
    rank: int
    torch_name: str | None


_IN_FILE_ORDER = [
    ("BOOL", 8, "bool"),
    ("F4", 4, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, "uint8"),
    ("I8", 8, "int8"),
    ("F8_E5M2", 8, "float8_e5m2"),
    ("F8_E4M3", 8, "float8_e4m3fn"),
    ("F8_E8M0", 8, "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    ("I16", 16, "int16"),
    ("U16", 16, "uint16"),
    ("F16", 16, "float16"),
    ("BF16", 16, "bfloat16"),
    ("I32", 32, "int32"),
    ("U32", 32, "uint32"),
    ("F32", 32, "float32"),
    ("C64", 64, "complex64"),
    ("F64", 64, "float64"),
    ("I64", 64, "int64"),
    ("U64", 64, "uint64"),
]

DTYPES: dict[str, DType] = {name: DType(bits, rank, t) for rank, (name, bits, t) in enumerate(_IN_FILE_ORDER)}

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Unquantized floating-point types: what a dense weight may be stored in."""


def torch_dtype(name: str) -> torch.dtype:
    """Returns torch's dtype for a safetensors dtype name.

    Raises:
        CheckpointError: torch has no such type.
    """
    import torch

    attribute = DTYPES[name].torch_name
    if attribute is None or not hasattr(torch, attribute):
        raise CheckpointError(f"dtype {name}: this torch ({torch.__version__}) has no such element type")
    found: torch.dtype = getattr(torch, attribute)
    return found
