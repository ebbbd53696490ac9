"""Carries out a plan: workers over shards, resume, and the order of writes that survives a crash.

The destination becomes a checkpoint at one moment, the rename of its index; until then no loader
takes it for one, and the same command goes on where it was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dsv3_tools.checkpoint.manifest import MANIFEST_NAME
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.crew import Crew
from dsv3_tools.conversion.destination import (
    State,
    clear,
    finished_shards,
    read_manifest,
    replaceable_nbytes,
    survey,
    withdraw,
)
from dsv3_tools.conversion.devices import count_workers, host_nbytes_per_worker, resolve_devices
from dsv3_tools.conversion.finish import finish
from dsv3_tools.conversion.identical import check_identical
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import Plan, ShardPlan
from dsv3_tools.conversion.preflight import check_places, check_room, check_scales, free_nbytes
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.conversion.workspace import JournalEntry, Workspace
from dsv3_tools.errors import CheckpointError, Dsv3Error

__all__ = ["Preview", "RunResult", "preview", "run"]

T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    `seconds` is the time from the first check to the last rename; `nonfinite` counts elements that
    are NaN or infinite by tensor, when they were kept; `blocks_compared` and `blocks_kept` count the
    blocks that were compared with an earlier quantization, and those that have its scale (a changed
    block may come to the same scale, with powers of two often). These are of the whole
    result, whichever run wrote it.
    """

    destination: Path
    operation: str
    already_complete: bool
    shards_written: int
    shards_resumed: int
    nbytes_in: int
    nbytes_out: int
    seconds: float
    devices: tuple[str, ...]
    workers: int
    nonfinite: Mapping[str, int]
    blocks_compared: int
    blocks_kept: int

    @property
    def manifest(self) -> Path:
        """Where the SHA-256 of every file is written down."""
        return self.destination / MANIFEST_NAME


@dataclass(frozen=True)
class Preview:
    """What a run would do with its destination.

    `nbytes_needed` is what the disk must have free: not what the run removes first. `host_nbytes` bounds
    the memory of all workers' buffers; `problem` is why the run would be refused, or None.
    """

    state: State
    shards_to_write: int
    nbytes_to_write: int
    nbytes_needed: int
    nbytes_free: int
    devices: tuple[str, ...]
    workers: int
    host_nbytes: int
    problem: Dsv3Error | None


def preview(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], destination: Path, options: RunOptions
) -> Preview:
    """Returns what `run` would do, having looked at everything but the data, and written nothing."""
    problem, state, missing, devices, needed = None, State.FRESH, plan.shards, ["cpu"], 0
    try:
        devices = resolve_devices(options.device, options.ranks)
        check_places(checkpoints, destination)
        state = survey(plan, destination, overwrite=options.overwrite)
        missing = _missing(plan, Workspace(destination), state)
        needed = _check_room(plan, Workspace(destination), state)
    except Dsv3Error as error:
        problem = error
    workers = count_workers(options.workers, devices, len(missing), options.ranks)
    return Preview(
        state=state,
        shards_to_write=len(missing),
        nbytes_to_write=sum(shard.nbytes for shard in missing),
        nbytes_needed=needed,
        nbytes_free=free_nbytes(destination),
        devices=tuple(devices),
        workers=workers,
        host_nbytes=workers * host_nbytes_per_worker(devices, workers, plan.shards),
        problem=problem,
    )


def run(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], destination: Path, options: RunOptions | None = None
) -> RunResult:
    """Carries out `plan`, or goes on with it.

    Args:
        plan: what to write.
        checkpoints: the sources by origin; "source" at least.
        destination: a directory that is empty, absent, or holds an interrupted run of this plan.
        options: devices, workers and the like.

    Raises:
        UsageError: source and destination overlap, or no such device.
        DestinationError: no room, no permission, or another run's files.
        CheckpointError: damaged source data, with tensor and index.
        Interrupted: a signal; everything finished is kept.
    """
    options = options or RunOptions()
    began = time.monotonic()
    ranks = options.ranks
    workspace = Workspace(destination)
    with ExitStack() as held:
        _check_same_plan(ranks, plan)
        devices = _together(ranks, lambda: resolve_devices(options.device, ranks))[ranks.rank]
        start = partial(_start, plan, checkpoints, workspace, options, held)
        resumed = _together(ranks, start if ranks.is_first else _nothing)[0]
        if resumed is None:
            return _result(plan, destination, began, devices, read_manifest(destination), complete=True)
        todo = ranks.share([shard for shard in plan.shards if shard.name not in resumed])
        workers = count_workers(options.workers, devices, len(todo), ranks)
        crew = Crew(plan, checkpoints, workspace, options, ranks, devices, workers)
        written = {name: e for part in _together(ranks, partial(crew.work, todo)) for name, e in part.items()}
        last = partial(finish, plan, checkpoints["source"], workspace, resumed | written)
        manifest = _together(ranks, last if ranks.is_first else _nothing)[0]
    return _result(
        plan,
        destination,
        began,
        devices,
        manifest or {},
        workers=workers,
        written=len(written),
        resumed=len(resumed),
    )


def _check_same_plan(ranks: Ranks, plan: Plan) -> None:
    """Refuses ranks that see different sources: their shards would be mixed.

    Raises:
        CheckpointError: on every rank.
    """
    if len(set(ranks.agree(plan.digest))) > 1:
        raise CheckpointError(
            "the ranks' plans differ: every rank must be given the same options and the same source files "
            "(with the same times), best on a shared filesystem"
        )


def _start(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    workspace: Workspace,
    options: RunOptions,
    held: ExitStack,
) -> dict[str, JournalEntry] | None:
    """Checks everything that can be checked, takes the lock; returns the shards that are done.

    Returns None when the whole result is there already.
    """
    destination, stop = workspace.destination, options.stop or Stop()
    check_places(checkpoints, destination)
    workspace.check_folder()
    locked = workspace.folder.exists()
    if locked:  # whoever works here is named at once
        held.enter_context(workspace.locked())
    state = survey(plan, destination, overwrite=options.overwrite)
    # A run killed while it removed its working folder leaves the result and part of that folder.
    if state is State.COMPLETE and not workspace.folder.exists():
        return None
    _check_room(plan, workspace, state)
    missing = _missing(plan, workspace, state)
    check_scales(missing, checkpoints, nonfinite=options.nonfinite, stop=stop)
    check_identical(plan.identical, checkpoints, stop)
    if not locked:
        held.enter_context(workspace.locked())
        # Another run may have come and gone since the first look.
        state = survey(plan, destination, overwrite=options.overwrite)
    if state is State.COMPLETE:
        workspace.remove()
        return None
    if state is State.FRESH:
        clear(destination)
        workspace.record_plan(plan)
    workspace.remove_temporaries()
    workspace.forget_failure()
    done = finished_shards(plan, workspace, keep_nonfinite=options.nonfinite == "keep", stop=stop)
    if len(done) < len(plan.shards):
        withdraw(destination)
    return done


def _missing(plan: Plan, workspace: Workspace, state: State) -> tuple[ShardPlan, ...]:
    """Returns the shards that no journal line speaks of."""
    if state is State.COMPLETE:
        return ()
    journal = workspace.read_journal() if state is State.RESUME else {}
    return tuple(shard for shard in plan.shards if shard.name not in journal)


def _check_room(plan: Plan, workspace: Workspace, state: State) -> int:
    """Refuses a run that the disk cannot hold, counting what it would remove first as free.

    Returns what it needs.
    """
    freed = workspace.temporary_nbytes()
    if state is State.FRESH:
        freed += replaceable_nbytes(workspace.destination)
    needed = sum(shard.nbytes for shard in _missing(plan, workspace, state))
    check_room(workspace.destination, needed - freed)
    return max(0, needed - freed)


def _nothing() -> None:
    """What the other ranks do while rank 0 acts."""


def _together(ranks: Ranks, act: Callable[[], T]) -> list[T]:
    """Lets every rank act, then returns what each has to say, or fails on all if one has failed."""
    try:
        value = act()
    except BaseException as error:
        known = error if isinstance(error, Dsv3Error) else Dsv3Error(f"{type(error).__name__}: {error}")
        ranks.agree(error=known)
        raise
    return ranks.agree(value)


def _result(
    plan: Plan,
    destination: Path,
    began: float,
    devices: list[str],
    manifest: Mapping[str, Any],
    *,
    complete: bool = False,
    workers: int = 0,
    written: int = 0,
    resumed: int = 0,
) -> RunResult:
    return RunResult(
        destination=destination,
        operation=plan.operation,
        already_complete=complete,
        shards_written=written,
        shards_resumed=len(plan.shards) if complete else resumed,
        nbytes_in=plan.nbytes_in,
        nbytes_out=plan.nbytes_out,
        seconds=time.monotonic() - began,
        devices=tuple(devices),
        workers=workers,
        nonfinite=manifest.get("nonfinite", {}),
        blocks_compared=manifest.get("blocks_compared", 0),
        blocks_kept=manifest.get("blocks_kept", 0),
    )
