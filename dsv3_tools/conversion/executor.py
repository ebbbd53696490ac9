"""Carries out a plan: workers over shards, resume, and the order of writes that survives a crash.

The destination becomes a checkpoint at one moment, the rename of its index; until then no loader
takes it for one, and the same command goes on where it was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dsv3_tools.checkpoint.manifest import MANIFEST_NAME
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.crew import Crew
from dsv3_tools.conversion.destination import (
    read_manifest,
)
from dsv3_tools.conversion.devices import count_workers, resolve_devices
from dsv3_tools.conversion.fetching import absent_shards
from dsv3_tools.conversion.finish import finish
from dsv3_tools.conversion.making import MADE, Made, Maker, Place, write_made
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import Plan, ShardPlan
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.conversion.publishing import publish, publish_again, title_of
from dsv3_tools.conversion.push_record import read_push_record
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.conversion.start import start
from dsv3_tools.conversion.uploading import Finished, Uploader
from dsv3_tools.conversion.workspace import JournalEntry, Workspace
from dsv3_tools.errors import CheckpointError, Dsv3Error, Interrupted

__all__ = ["RunResult", "run"]

T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    `seconds` is the time from the first check to the last rename; `nonfinite` counts elements that
    are NaN or infinite by tensor, when they were kept; `blocks_compared` and `blocks_kept` count the
    blocks that were compared with an earlier quantization, and those that have its scale (a changed
    block may come to the same scale, with powers of two often). These are of the whole
    result, whichever run wrote it. `pushed` is the commit on the Hub that has the result.
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
    pushed: str | None = None

    @property
    def shards_are_here(self) -> bool:
        """Whether the result is in the destination, and not on the Hub alone."""
        record = read_push_record(self.destination)
        return record is None or not record.removed

    @property
    def manifest(self) -> Path:
        """Where the SHA-256 of every file is written down."""
        return self.destination / MANIFEST_NAME


def run(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    destination: Path,
    options: RunOptions | None = None,
    maker: Maker | None = None,
) -> RunResult:
    """Carries out `plan`, or goes on with it.

    Args:
        plan: what to write.
        checkpoints: the sources by origin; "source" at least.
        destination: a directory that is empty, absent, or holds an interrupted run of this plan.
        options: devices, workers and the like.
        maker: makes weights that are not recoded step by step.

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
        uploader = _uploader(plan, destination, options)
        scratch = 0 if maker is None else maker.scratch_nbytes
        begin = partial(start, plan, checkpoints, workspace, options, devices, held, uploader, scratch)
        resumed = _together(ranks, begin if ranks.is_first else _nothing)[0]
        if resumed is None:
            found = read_manifest(destination)
            pushed = None if uploader is None else publish_again(plan, destination, found, options, uploader)
            return _result(plan, destination, began, devices, found, complete=True, pushed=pushed)
        missing = [shard for shard in plan.shards if shard.name not in resumed]
        todo = ranks.share(missing)
        workers = count_workers(options.workers, devices, len(todo), ranks)
        if uploader is not None:
            held.enter_context(uploader)
            for entry in resumed.values():  # in the background: there may be many
                uploader.add(Finished(entry.shard, entry.sha256))
        crew = partial(Crew, plan, checkpoints, workspace, ranks=ranks, uploader=uploader)
        if maker is None:
            needs = absent_shards(todo, checkpoints)
            work = crew(options, devices=devices, workers=workers, needs=needs).work
            parts = _together(ranks, partial(work, todo))
            files: Callable[[], dict[str, bytes]] = dict
        else:
            place = _place(workspace, devices[0], options, todo)
            # Who fails ends at once, and torchrun the others: they may wait in the middle of a copy.
            parts = ranks.agree(_make(maker, missing, place, crew, options, workers))
            files = partial(maker.files, place)
        written = {name: entry for part in parts for name, entry in part.items()}
        done = resumed | written
        last = partial(_finish, plan, checkpoints["source"], workspace, done, options, uploader, files)
        manifest, pushed = _together(ranks, last if ranks.is_first else _nothing)[0] or ({}, None)
    return _result(
        plan,
        destination,
        began,
        devices,
        manifest,
        workers=workers,
        pushed=pushed,
        written=len(written),
        resumed=len(resumed),
    )


def _uploader(plan: Plan, destination: Path, options: RunOptions) -> Uploader | None:
    if options.hub.push is None:
        return None
    stop, total = options.stop or Stop(), len(plan.shards)
    title, keep = title_of(plan.operation, plan.digest), options.hub.keep_output
    return Uploader(options.hub.push, title, destination, keep=keep, total=total, stop=stop)


def _finish(
    plan: Plan,
    source: Checkpoint,
    workspace: Workspace,
    done: Mapping[str, JournalEntry],
    options: RunOptions,
    uploader: Uploader | None,
    files: Callable[[], Mapping[str, bytes]],
) -> tuple[dict[str, Any], str | None]:
    """Writes the small files, and uploads them if asked; returns the manifest, and the commit on the Hub."""
    manifest = finish(plan, source, workspace, done, files())
    pushed = None if uploader is None else publish(plan, workspace.destination, manifest, options, uploader)
    workspace.remove()
    return manifest, pushed


def _place(workspace: Workspace, device: str, options: RunOptions, todo: Sequence[ShardPlan]) -> Place:
    """Returns where and how a rank makes weights."""
    return Place(
        folder=workspace.making_folder,
        destination=workspace.destination,
        device=device,
        ranks=options.ranks,
        stop=options.stop or Stop(),
        own=frozenset(shard.name for shard in todo),
        on_progress=options.on_progress,
    )


def _make(
    maker: Maker,
    missing: Sequence[ShardPlan],
    place: Place,
    crew: Callable[..., Crew],
    options: RunOptions,
    workers: int,
) -> dict[str, JournalEntry]:
    """Has the missing shards made, and writes this rank's; GPUs are left to those who make the next.

    Raises:
        Interrupted: a signal asked to stop.
        Dsv3Error: they could not be made or written.
    """

    def write(batch: Made) -> Mapping[str, JournalEntry]:
        shards = [shard for shard in batch.shards if shard.name in place.own]
        if not shards:
            return {}
        one = crew(
            replace(options, on_progress=None),
            devices=["cpu"],
            workers=min(workers, len(shards)),
            needs={shard.name: () for shard in shards},
            made={} if batch.weights is None else {MADE: batch.weights},
        )
        return one.work(shards)

    try:
        return write_made(maker.make(missing, place), write)
    except Interrupted as error:
        raise Interrupted(
            error.signum,
            f"{place.destination}: stopped; finished layers are kept, the same command goes on from there",
        ) from None


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
    pushed: str | None = None,
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
        pushed=pushed,
    )
