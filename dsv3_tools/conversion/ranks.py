"""Several processes on one run: what `torchrun` starts, each with its share of the shards.

All that the ranks say to each other is "go on" or "stop, because": the work itself meets on the
shared filesystem. Rank 0 checks, holds the lock and finishes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from dsv3_tools.errors import Dsv3Error

__all__ = ["Ranks"]

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""A rank may wait this long for the others; torchrun ends all ranks at once when one dies."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone unless `torchrun` started it."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """Joins the process group that torchrun's environment describes, if there is one."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return cls()
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_PATIENCE)
            # Gloo's threads abort a process that ends before its group: "terminate called", exit code 134.
            atexit.register(_leave)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks to the user and finishes the run."""
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return int(os.environ.get("LOCAL_RANK", "0")) if self.world_size > 1 else 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Returns this rank's part of `items`."""
        return list(items[self.rank :: self.world_size])

    def agree(self, value: Any = None, error: Dsv3Error | None = None) -> list[Any]:
        """Waits for all ranks and returns the value of each.

        Raises:
            Dsv3Error: this rank's error, or else the first one of another rank.
        """
        if error is not None and self.world_size == 1:
            raise error
        outcomes: list[Any] = [(value, error)]
        if self.world_size > 1:
            from torch import distributed

            outcomes = [None] * self.world_size
            distributed.all_gather_object(
                outcomes, (value, None if error is None else (type(error), str(error)))
            )
            if any(failure is not None for _, failure in outcomes):
                # torchrun ends all ranks as soon as one has failed: rank 0 must have spoken by then.
                atexit.register(distributed.barrier)
            if error is not None:
                raise error
            for rank, (_, failure) in enumerate(outcomes):
                if failure is not None:
                    raise _same_kind(failure[0], f"rank {rank}: {failure[1]}")
        return [found for found, _ in outcomes]


def _leave() -> None:
    """Ends the process group, unless the caller has done so."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _same_kind(kind: type[Dsv3Error], message: str) -> Dsv3Error:
    """Returns an error with the exit code of another rank's."""
    error = Dsv3Error(message)
    error.exit_code = kind.exit_code
    return error
