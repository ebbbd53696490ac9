"""Host memory that a layer's quantized weights go through to the disk, pinned once and used again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["HostBuffers"]


class HostBuffers:
    """Two pieces of memory in turn: one is being written to the disk while the other is filled.

    Args:
        device: that is copied from.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor | None] = [None, None]

    def copy(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Returns copies of some bytes, valid until the next call but one."""
        import torch

        total = sum(len(flat) for flat in flats)
        self._buffers.reverse()
        buffer = self._buffers[0]
        if buffer is None or len(buffer) < total:
            self._buffers[0] = None  # before more is taken
            buffer = self._buffers[0] = torch.empty(
                total, dtype=torch.uint8, pin_memory=self._device.type == "cuda"
            )
        copies, place = [], 0
        for flat in flats:
            copies.append(buffer[place : place + len(flat)].copy_(flat, non_blocking=True))
            place += len(flat)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copies
