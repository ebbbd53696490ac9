"""The hidden states of all calibration tokens, wherever there is room, in blocks of whole sequences.

Blocks do not depend on who computes them, so that every rank gets the same numbers from the same weights.

Shape suffixes: B sequences, L tokens of a sequence, D hidden, T = B x L.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.durable import destination_errors
from dsv3_tools.model.layer import TOKENS_AT_ONCE
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.quantize.parallel import in_parallel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["States", "available_memory", "choose_place"]

_SHARE_OF_DEVICE = 0.35
"""What hidden states take of a GPU's free memory at most; a layer and an expert's Hessians need the rest."""

_SHARE_OF_HOST = 0.5


def choose_place(nbytes: int, device: torch.device, budget: int | None, processes_here: int) -> str:
    """Returns where hidden states go: "device", "host" or "file".

    Args:
        nbytes: of all of them.
        device: that computes.
        budget: bytes of memory, GPU or host, that they may take; None is a part of what is free.
        processes_here: that share the host's memory.
    """
    import torch

    limit = budget
    if device.type == "cuda":
        limit = int(_SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]) if budget is None else budget
        if nbytes <= limit:
            return "device"
    if budget is None:
        limit = int(_SHARE_OF_HOST * available_memory()) // max(1, processes_here)
    return "host" if nbytes <= (limit or 0) else "file"


def available_memory() -> int:
    """Returns the bytes of host memory that are free or can be freed, within the limit of a container."""
    known = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        known = min(known, int((group / "memory.max").read_text()) - used)
    return max(0, known)


class States:
    """Hidden states `[B, L, D]`.

    Args:
        values_BLD: on the device, in (pinned) host memory, or a file mapped into memory.
        device: that computes.
        ranks: that share the work, each with all of the states.
        split: no block has sequences before and after this one.
    """

    def __init__(self, values_BLD: Tensor, device: torch.device, ranks: RankGroup, split: int) -> None:
        self.values_BLD = values_BLD
        self.device = device
        self._ranks = ranks
        self.split = split

    @classmethod
    def make(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        place: str,
        folder: Path,
        device: torch.device,
        ranks: RankGroup,
        split: int,
    ) -> States:
        """Returns states without content; a file in `folder`, which must be there, is one of each rank."""
        import torch

        if place == "file":
            path = folder / f"states-{ranks.rank}.bin"
            count = shape[0] * shape[1] * shape[2]
            with destination_errors(path, "making room for hidden states"):
                path.unlink(missing_ok=True)
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
                values = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
                path.unlink()  # the mapping keeps it, until the process ends
        elif place == "host":
            values = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        else:
            values = torch.empty(shape, dtype=dtype, device=device)
        return cls(values, device, ranks, split)

    def shortened(self, change: Callable[[slice], Tensor]) -> States:
        """Returns states with a token less in every sequence, in the memory of these, which are gone then.

        Args:
            change: makes a block `[B, L - 1, D]` on the device of the sequences of a slice.
        """
        count, length, width = self.values_BLD.shape
        flat = self.values_BLD.view(-1)[: count * (length - 1) * width]
        shorter = States(flat.view(count, length - 1, width), self.device, self._ranks, self.split)
        # In order: a block is written where those before it were, and itself, of which the device has a copy.
        for rows in self.own_blocks():
            shorter.values_BLD[rows].copy_(change(rows))
        for number, rows in enumerate(self.blocks()):
            shorter._broadcast(rows, number)
        return shorter

    def blocks(self, tokens: int = TOKENS_AT_ONCE) -> list[slice]:
        """Returns slices of sequences, of at most so many tokens each, or of one sequence."""
        count, length = self.values_BLD.shape[:2]
        step = max(1, tokens // length)
        return [
            slice(start, min(start + step, end))
            for begin, end in ((0, self.split), (self.split, count))
            for start in range(begin, end, step)
        ]

    def block(self, rows: slice) -> Tensor:
        """Returns a block on the device."""
        return self.values_BLD[rows].to(self.device)

    def rows(self, tokens_T: Tensor) -> Tensor:
        """Returns some tokens' hidden states `[T, D]` on the device."""
        import torch

        flat_TD = self.values_BLD.flatten(0, 1)
        tokens_T = tokens_T.to(flat_TD.device)
        if flat_TD.device == self.device:
            return flat_TD.index_select(0, tokens_T)
        out_TD = torch.empty((len(tokens_T), flat_TD.shape[1]), dtype=flat_TD.dtype, pin_memory=True)
        return torch.index_select(flat_TD, 0, tokens_T, out=out_TD).to(self.device)

    def own_blocks(self, tokens: int = TOKENS_AT_ONCE) -> list[slice]:
        """Returns the blocks that this rank computes."""
        return self.blocks(tokens)[self._ranks.rank :: self._ranks.world_size]

    def update(self, change: Callable[[Tensor], Tensor], *, tokens: int = TOKENS_AT_ONCE) -> None:
        """Replaces every block by what `change` makes of it, on the device; each rank computes its own."""

        def work(rows: slice) -> None:
            self.values_BLD[rows].copy_(change(self.block(rows)))

        in_parallel(self.own_blocks(tokens), work, self.device, self._ranks.processes_here)
        self.share(tokens)

    def share(self, tokens: int = TOKENS_AT_ONCE) -> None:
        """Gives every rank the blocks that the others have computed."""
        for number, rows in enumerate(self.blocks(tokens)):
            self._broadcast(rows, number)

    def _broadcast(self, rows: slice, number: int) -> None:
        if self._ranks.world_size > 1:
            block = self.block(rows).contiguous()
            self._ranks.broadcast_(block, number % self._ranks.world_size)
            self.values_BLD[rows].copy_(block)
