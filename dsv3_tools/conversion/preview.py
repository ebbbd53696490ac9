"""What a run would do with its destination, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.destination import (
    State,
    survey,
)
from dsv3_tools.conversion.devices import count_workers, host_nbytes_per_worker, resolve_devices
from dsv3_tools.conversion.making import Maker
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.preflight import check_places, free_nbytes
from dsv3_tools.conversion.room import Room, room_for
from dsv3_tools.conversion.start import missing_shards
from dsv3_tools.conversion.uploading import check_target, own_shards
from dsv3_tools.conversion.workspace import Workspace
from dsv3_tools.errors import Dsv3Error

__all__ = ["Preview", "preview"]


@dataclass(frozen=True)
class Preview:
    """What a run would do with its destination.

    `nbytes_needed` is what the disk must have free: not what the run removes first. `host_nbytes` bounds
    the memory of all workers' buffers; `problem` is why the run would be refused, or None. `nbytes_to_fetch`
    come from the Hub, of which at most `nbytes_staged` lie beside the result at once.
    """

    state: State
    shards_to_write: int
    nbytes_to_write: int
    nbytes_needed: int
    nbytes_free: int
    nbytes_to_fetch: int
    nbytes_staged: int
    devices: tuple[str, ...]
    workers: int
    host_nbytes: int
    problem: Dsv3Error | None


def preview(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    destination: Path,
    options: RunOptions,
    maker: Maker | None = None,
) -> Preview:
    """Returns what `run` would do, having looked at everything but the data, and written nothing."""
    problem, state, missing, devices, room = None, State.FRESH, plan.shards, ["cpu"], Room()
    try:
        devices = resolve_devices(options.device, options.ranks)
        check_places(checkpoints, destination)
        state = survey(plan, destination, overwrite=options.overwrite, hub=options.hub)
        missing = missing_shards(plan, Workspace(destination), state)
        workers = count_workers(options.workers, devices, len(missing), options.ranks)
        scratch = 0 if maker is None else maker.scratch_nbytes
        room = room_for(missing, checkpoints, Workspace(destination), state, options, workers, scratch)
        room.check(destination)
        if options.hub.push is not None and not options.overwrite and state is not State.COMPLETE:
            check_target(options.hub.push, own_shards(plan, Workspace(destination), state))
    except Dsv3Error as error:
        problem = error
    workers = count_workers(options.workers, devices, len(missing), options.ranks)
    return Preview(
        state=state,
        shards_to_write=len(missing),
        nbytes_to_write=sum(shard.nbytes for shard in missing),
        nbytes_needed=room.needed,
        nbytes_free=free_nbytes(destination),
        nbytes_to_fetch=room.fetched,
        nbytes_staged=room.staged,
        devices=tuple(devices),
        workers=workers,
        host_nbytes=workers * host_nbytes_per_worker(devices, workers, plan.shards),
        problem=problem,
    )
