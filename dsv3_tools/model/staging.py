"""Bytes of a checkpoint into tensors: on the CPU directly, on a GPU through a little pinned memory.

Every reading thread has two pinned slabs: one fills from the file while the other is copied to the device.
All threads share one copy stream, whose allocations the thread that computes may free at any time.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["SLAB_NBYTES", "CpuReader", "CudaReader", "Reader", "make_reader"]

SLAB_NBYTES = 16 << 20
"""Pinned memory of a slab; a thread has two."""


class Reader(ABC):
    """Reads tensors, or stretches of them, to one device; may be used by several threads."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint, name: str, start: int, spec: TensorSpec) -> Tensor:
        """Returns the tensor of `spec` that begins at byte `start` of a stored tensor.

        Raises:
            CheckpointError: it cannot be read.
        """

    @abstractmethod
    def wait(self) -> None:
        """Makes the device memory that this thread has filled usable: returns when all copies are done."""


class CpuReader(Reader):
    """Reads straight into new tensors."""

    def read(self, checkpoint: Checkpoint, name: str, start: int, spec: TensorSpec) -> Tensor:
        """Returns the tensor, in memory of its own."""
        import torch

        flat = torch.empty(spec.nbytes, dtype=torch.uint8)
        checkpoint.read_into(name, start, flat.numpy().data)
        return flat.view(torch_dtype(spec.dtype)).reshape(spec.shape)

    def wait(self) -> None:
        """Returns at once: nothing is copied behind the thread's back."""


class CudaReader(Reader):
    """Reads into pinned slabs and queues their copies to the device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._local = threading.local()

    def read(self, checkpoint: Checkpoint, name: str, start: int, spec: TensorSpec) -> Tensor:
        """Returns device memory that will hold the tensor once `wait` has returned."""
        import torch

        slabs = self._slabs()
        with torch.cuda.stream(self._stream):
            flat = torch.empty(spec.nbytes, dtype=torch.uint8, device=self._device)
            for begin in range(0, spec.nbytes, SLAB_NBYTES):
                slab, copied = slabs[0], slabs[0].copied
                slabs.reverse()
                count = min(SLAB_NBYTES, spec.nbytes - begin)
                copied.synchronize()
                checkpoint.read_into(name, start + begin, slab.bytes[:count])
                flat[begin : begin + count].copy_(slab.memory[:count], non_blocking=True)
                copied.record(self._stream)
        return flat.view(torch_dtype(spec.dtype)).reshape(spec.shape)

    def wait(self) -> None:
        """Waits for this thread's copies."""
        for slab in self._slabs():
            slab.copied.synchronize()

    def _slabs(self) -> list[_Slab]:
        if not hasattr(self._local, "slabs"):
            self._local.slabs = [_Slab(), _Slab()]
        slabs: list[_Slab] = self._local.slabs
        return slabs


class _Slab:
    """Pinned memory and the event that says that it has been copied."""

    def __init__(self) -> None:
        import torch

        self.memory = torch.empty(SLAB_NBYTES, dtype=torch.uint8, pin_memory=True)
        self.bytes = self.memory.numpy().data
        self.copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def make_reader(device: torch.device) -> Reader:
    """Returns a reader to `device`."""
    return CudaReader(device) if device.type == "cuda" else CpuReader()
