"""How a plan is carried out: choices that change no byte of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_tools.conversion.hub_target import PushTarget
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.conversion.ranks import ALONE, Ranks
from dsv3_tools.errors import UsageError

__all__ = ["HubOptions", "RunOptions"]


@dataclass(frozen=True)
class HubOptions:
    """What a run does with the Hugging Face Hub beyond reading from it.

    Attributes:
        keep_source: shards that were fetched stay in the Hugging Face cache.
        push: where finished shards are uploaded to, and at last the rest.
        keep_output: they stay here as well.
    """

    keep_source: bool = False
    push: PushTarget | None = None
    keep_output: bool = True

    def __post_init__(self) -> None:
        if self.push is None and not self.keep_output:
            raise UsageError("--no-keep-output: asks for --push, or nothing would be left")


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
        hub: what is kept of downloads, and where the result is uploaded to.
    """

    device: str = "auto"
    workers: int | None = None
    overwrite: bool = False
    nonfinite: str = "error"
    on_progress: Callable[[Progress], None] | None = None
    stop: Stop | None = None
    ranks: Ranks = ALONE
    hub: HubOptions = HubOptions()

    def __post_init__(self) -> None:
        if self.nonfinite not in ("error", "keep"):
            raise UsageError(f"nonfinite: got {self.nonfinite!r}, expected 'error' or 'keep'")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers: got {self.workers}, expected at least 1")
        if self.hub.push is not None and self.ranks.world_size > 1:
            raise UsageError("--push: one process uploads; under torchrun, run dsv3 push afterwards")
