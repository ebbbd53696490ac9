"""The hidden states of all calibration tokens, wherever there is room, in blocks of whole sequences.

Blocks do not depend on who computes them, so that every rank gets the same numbers from the same weights.

Shape suffixes: B sequences, L tokens of a sequence, D hidden, T = B x L.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_tools.model.layer import TOKENS_AT_ONCE
from dsv3_tools.model.parallel import RankGroup

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["States", "choose_place"]

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
    import os

    import torch

    limit = budget
    if device.type == "cuda":
        limit = int(_SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]) if budget is None else budget
        if nbytes <= limit:
            return "device"
    if budget is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = int(_SHARE_OF_HOST * available) // max(1, processes_here)
    return "host" if nbytes <= (limit or 0) else "file"


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
            path.unlink(missing_ok=True)
            values = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
            path.unlink()  # the mapping keeps it, until the process ends
        elif place == "host":
            values = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        else:
            values = torch.empty(shape, dtype=dtype, device=device)
        return cls(values, device, ranks, split)

    def like(self, folder: Path, place: str, length: int) -> States:
        """Returns states of shorter sequences, without content, in such a place."""
        count, _, width = self.values_BLD.shape
        return States.make(
            (count, length, width),
            self.values_BLD.dtype,
            place=place,
            folder=folder,
            device=self.device,
            ranks=self._ranks,
            split=self.split,
        )

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
        flat_TD = self.values_BLD.flatten(0, 1)
        return flat_TD.index_select(0, tokens_T.to(flat_TD.device)).to(self.device)

    def own_blocks(self, tokens: int = TOKENS_AT_ONCE) -> list[slice]:
        """Returns the blocks that this rank computes."""
        return self.blocks(tokens)[self._ranks.rank :: self._ranks.world_size]

    def update(self, change: Callable[[Tensor], Tensor], *, tokens: int = TOKENS_AT_ONCE) -> None:
        """Replaces every block by what `change` makes of it, on the device; each rank computes its own."""
        for rows in self.own_blocks(tokens):
            self.values_BLD[rows].copy_(change(self.block(rows)))
        self.share(tokens)

    def share(self, tokens: int = TOKENS_AT_ONCE) -> None:
        """Gives every rank the blocks that the others have computed."""
        if self._ranks.world_size == 1:
            return
        for number, rows in enumerate(self.blocks(tokens)):
            block = self.block(rows).contiguous()
            self._ranks.broadcast_(block, number % self._ranks.world_size)
            self.values_BLD[rows].copy_(block)
