"""The beginning of a run: everything that can be checked is, the lock is taken, what is done is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.destination import (
    State,
    clear,
    finished_shards,
    survey,
    withdraw,
)
from dsv3_tools.conversion.devices import count_workers
from dsv3_tools.conversion.fetching import absent_shards, fetch_for
from dsv3_tools.conversion.hub_target import unless_stopped
from dsv3_tools.conversion.identical import check_identical
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import Plan, ShardPlan, TensorRef
from dsv3_tools.conversion.preflight import check_places, check_scales
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.conversion.room import room_for
from dsv3_tools.conversion.uploading import Uploader, own_shards
from dsv3_tools.conversion.workspace import JournalEntry, Workspace

__all__ = ["missing_shards", "start"]


def start(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    workspace: Workspace,
    options: RunOptions,
    devices: Sequence[str],
    held: ExitStack,
    uploader: Uploader | None,
    scratch: int = 0,
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
    state = survey(plan, destination, overwrite=options.overwrite, hub=options.hub)
    # A run killed while it removed its working folder leaves the result and part of that folder.
    if state is State.COMPLETE and not workspace.folder.exists():
        return None
    missing = missing_shards(plan, workspace, state)
    workers = count_workers(options.workers, devices, len(missing), options.ranks)
    room_for(missing, checkpoints, workspace, state, options, workers, scratch).check(destination)
    needs = absent_shards(missing, checkpoints)
    here = [shard for shard in missing if not needs[shard.name]]
    check_scales(here, checkpoints, nonfinite=options.nonfinite, stop=stop)
    elsewhere = [ref for pair in plan.identical for ref in pair if not _is_here(ref, checkpoints)]
    if not elsewhere:
        check_identical(plan.identical, checkpoints, stop)
    if not locked:
        held.enter_context(workspace.locked())
        # Another run may have come and gone since the first look.
        state = survey(plan, destination, overwrite=options.overwrite, hub=options.hub)
    if state is State.COMPLETE:
        workspace.remove()
        return None
    with _untouched_if_refused(workspace, state):
        workspace.tidy_sources({key for keys in needs.values() for key in keys}, options.ranks.world_size)
        if elsewhere:  # shards have to be fetched first
            folder = None if options.hub.keep_source else workspace.source_folder(options.ranks.rank)
            unless_stopped(lambda: fetch_for(elsewhere, checkpoints, folder, stop.check), stop.check)
            check_identical(plan.identical, checkpoints, stop)
        there = _begin_upload(plan, workspace, state, options, uploader)
    if state is State.FRESH:
        clear(destination)
        workspace.record_plan(plan)
    workspace.remove_temporaries()
    workspace.forget_failure()
    keep = options.nonfinite == "keep"
    done = finished_shards(plan, workspace, keep_nonfinite=keep, stop=stop, elsewhere=there)
    if len(done) < len(plan.shards):
        withdraw(destination)
    return done


@contextmanager
def _untouched_if_refused(workspace: Workspace, state: State) -> Iterator[None]:
    """Removes the working folder after a refusal, if it holds no run: what is there stays what it is."""
    try:
        yield
    except BaseException:
        if state is State.FRESH and not workspace.has_plan():
            workspace.remove()
            with suppress(OSError):
                workspace.destination.rmdir()  # unless something is in it
        raise


def _begin_upload(
    plan: Plan, workspace: Workspace, state: State, options: RunOptions, uploader: Uploader | None
) -> dict[str, str]:
    """Returns the shards that are on the Hub and need not be here, with their SHA-256."""
    if uploader is None:
        return {}
    there = uploader.begin(own_shards(plan, workspace, state), overwrite=options.overwrite)
    return {} if options.hub.keep_output else there


def missing_shards(plan: Plan, workspace: Workspace, state: State) -> tuple[ShardPlan, ...]:
    """Returns the shards that no journal line speaks of."""
    if state is State.COMPLETE:
        return ()
    journal = workspace.read_journal() if state is State.RESUME else {}
    return tuple(shard for shard in plan.shards if shard.name not in journal)


def _is_here(ref: TensorRef, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether a tensor's shard is on disk, to stay."""
    checkpoint = checkpoints[ref.origin]
    return ref.name not in checkpoint.weight_map or checkpoint.is_kept(checkpoint.weight_map[ref.name])
