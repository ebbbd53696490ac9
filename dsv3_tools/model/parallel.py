"""Several processes on one forward pass: experts, heads and intermediate rows divided over ranks.

Every rank has all hidden states and reads only its own weights (and, of matrices divided by columns, whole
rows: a column of a file lies in as many places as there are rows). Each block ends in one sum over ranks, in
float32. Router, norms, embedding, head and the two projections to latents are the same on every rank, so
nothing else needs to be said.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dsv3_tools.errors import Dsv3Error, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ALONE", "PATIENCE", "RankGroup"]

PATIENCE = timedelta(hours=2)
"""A rank may wait this long for another that reads its weights from a slower disk."""


@dataclass(frozen=True)
class RankGroup:
    """This process among those of the forward pass.

    Attributes:
        group: torch's process group; None is the default one.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None

    @classmethod
    def join(cls, device: torch.device) -> RankGroup:
        """Joins the processes that torchrun has started with this one, if it has.

        Sums go through NCCL between GPUs and through gloo between CPUs. A default group of another kind
        that is there already gets one of the right kind beside it.

        Raises:
            UsageError: the processes cannot meet.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return cls()
        import torch
        from torch import distributed

        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            if not distributed.is_initialized():
                distributed.init_process_group(backend, timeout=PATIENCE)
                atexit.register(_leave)  # gloo's threads abort a process that ends before its group
            group = None
            if distributed.get_backend() != backend:
                group = distributed.new_group(backend=backend, timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"the ranks' processes cannot meet: {error}") from error
        return cls(distributed.get_rank(), distributed.get_world_size(), group)

    @property
    def processes_here(self) -> int:
        """How many of the processes are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world_size > 1 else 1

    def share(self, count: int) -> range:
        """Returns this rank's part of `count` neighbours: whole numbers, as even as can be."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def sum_(self, values: Tensor) -> Tensor:
        """Replaces `values` by their sum over all ranks, and returns them."""
        if self.world_size > 1:
            from torch import distributed

            distributed.all_reduce(values, group=self.group)
        return values

    def broadcast_(self, values: Tensor, rank: int) -> Tensor:
        """Replaces `values` by those of `rank`, of the same shape, and returns them."""
        if self.world_size > 1:
            import torch
            from torch import distributed

            flat = values.view(torch.uint8) if values.dim() else values  # gloo does not know every type
            try:
                distributed.broadcast(
                    flat, distributed.get_global_rank(self._group(), rank), group=self.group
                )
            except RuntimeError as error:  # of the connection: what went wrong there, that rank has said
                raise Dsv3Error(f"another rank has ended: {str(error).splitlines()[0]}") from error
        return values

    def _group(self) -> Any:
        from torch import distributed

        return distributed.group.WORLD if self.group is None else self.group


ALONE = RankGroup()
"""A forward pass in one process."""


def _leave() -> None:
    """Ends the process group, unless the caller has done so."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
