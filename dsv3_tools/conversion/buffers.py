"""Tensors and bytes over the same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.specs import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["as_array", "as_bytes", "view"]


def view(buffer: Tensor, start: int, spec: TensorSpec) -> Tensor:
    """Returns the tensor of `spec` that begins at byte `start` of a flat uint8 buffer."""
    return buffer[start : start + spec.nbytes].view(torch_dtype(spec.dtype)).reshape(spec.shape)


def as_array(tensor: Tensor) -> NDArray[np.uint8]:
    """Returns a contiguous CPU tensor's bytes as a flat array."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns a contiguous CPU tensor's bytes as a buffer."""
    return as_array(tensor).data
