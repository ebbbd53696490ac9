"""How a plan is carried out: choices that change no byte of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.conversion.ranks import ALONE, Ranks
from dsv3_tools.errors import UsageError

__all__ = ["RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """How a plan is carried out; none of this changes the bytes written.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:0,1".
        workers: shards worked on at once; None chooses by device and cores.
        overwrite: a destination that holds something else may be replaced.
        nonfinite: "error" refuses NaN and infinity, "keep" counts them in the manifest.
        on_progress: called with every step, from any thread.
        stop: lets a signal handler end the run cleanly.
        ranks: the processes that share the run; alone unless the caller has joined others.
    """

    device: str = "auto"
    workers: int | None = None
    overwrite: bool = False
    nonfinite: str = "error"
    on_progress: Callable[[Progress], None] | None = None
    stop: Stop | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if self.nonfinite not in ("error", "keep"):
            raise UsageError(f"nonfinite: got {self.nonfinite!r}, expected 'error' or 'keep'")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers: got {self.workers}, expected at least 1")
