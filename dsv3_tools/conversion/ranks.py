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

from dsv3_tools.errors import Dsv3Error, UsageError

__all__ = ["ALONE", "Ranks"]

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
        """Joins the processes that torchrun has started with this one, if it has."""
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from torch import distributed

        if not distributed.is_initialized():
            try:
                distributed.init_process_group("gloo", timeout=_PATIENCE)
            except (ValueError, RuntimeError) as error:
                raise UsageError(f"torchrun's processes cannot meet: {error}") from error
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

    @property
    def processes_here(self) -> int:
        """How many of the processes are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world_size > 1 else 1

    def agree(self, value: Any = None, error: Dsv3Error | None = None) -> list[Any]:
        """Waits for all ranks and returns the value of each; nothing if this rank brings an `error`.

        Raises:
            Dsv3Error: the first error of another rank.
        """
        if self.world_size == 1:
            return [] if error is not None else [value]
        from torch import distributed

        outcomes: list[Any] = [None] * self.world_size
        failure = None if error is None else (error.exit_code, str(error))
        distributed.all_gather_object(outcomes, (value, failure))
        failures = [(rank, *failed) for rank, (_, failed) in enumerate(outcomes) if failed is not None]
        if failures:
            # torchrun ends all ranks as soon as one has failed: rank 0 must have spoken by then.
            atexit.register(distributed.barrier)
        if error is not None:
            return []
        if failures:
            raise _from_rank(*failures[0])
        return [found for found, _ in outcomes]


ALONE = Ranks()
"""A run of one process."""


def _leave() -> None:
    """Ends the process group, unless the caller has done so."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _from_rank(rank: int, exit_code: int, message: str) -> Dsv3Error:
    """Returns another rank's error, with its exit code."""
    error = Dsv3Error(f"rank {rank}: {message}")
    error.exit_code = exit_code
    return error
