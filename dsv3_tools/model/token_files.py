"""Files of token ids: `.npy` and `.safetensors`, memory-mapped, so that only what is used is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.checkpoint.files import read_shard_header
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["read_token_file"]

_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_NAMES = ("tokens", "input_ids")


def read_token_file(path: Path) -> npt.NDArray[np.integer[Any]]:
    """Returns the ids in a file: one stream (1-D), or one sequence in each row (2-D).

    A `.safetensors` file has one integer tensor of one or two dimensions, or one named "tokens" or
    "input_ids" among others.

    Raises:
        CheckpointError: the file cannot be read, or has no such array.
        UsageError: another kind of file.
    """
    if path.suffix == ".npy":
        return _read_npy(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise UsageError(
        f"{path}: got a {path.suffix or 'nameless'} file, expected .npy or .safetensors with token ids"
    )


def _read_npy(path: Path) -> npt.NDArray[np.integer[Any]]:
    import numpy as np

    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
    except Exception as error:  # of many classes: the header is Python; objects are refused, never unpickled
        raise CheckpointError(f"{path}: not an array of numbers: {' '.join(str(error).split())}") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise CheckpointError(
            f"{path}: got {array.dtype} {list(array.shape)}, expected integers with 1 or 2 dimensions"
        )
    return array


def _read_safetensors(path: Path) -> npt.NDArray[np.integer[Any]]:
    import numpy as np

    real = path.resolve()
    header = read_shard_header(real.parent, real.name).header
    name = _choose(header.specs, path)
    spec = header.specs[name]
    dtype = np.dtype(DTYPES[spec.dtype].torch_name).newbyteorder("<")
    if not spec.num_elements:  # nothing to map
        return np.empty(spec.shape, dtype)
    return np.memmap(real, dtype, mode="r", offset=header.offsets[name], shape=spec.shape)


def _choose(specs: Mapping[str, TensorSpec], path: Path) -> str:
    """Returns the name of the tensor with the ids."""
    suitable = [n for n, spec in specs.items() if spec.dtype in _INTEGERS and len(spec.shape) in (1, 2)]
    named = [name for name in _NAMES if name in suitable]
    if named or len(suitable) == 1:
        return (named or suitable)[0]
    there = ", ".join(f"{name} {spec}" for name, spec in list(specs.items())[:10]) or "no tensor"
    raise CheckpointError(
        f"{path}: got {there}, expected one integer tensor with 1 or 2 dimensions, "
        f"or one named {' or '.join(_NAMES)}"
    )
