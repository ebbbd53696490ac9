"""What a run needs on disks, known before its first byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.destination import State, replaceable_nbytes
from dsv3_tools.conversion.fetching import PREFETCH, absent_shards, peak_nbytes
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import ShardPlan
from dsv3_tools.conversion.preflight import check_room, filesystem
from dsv3_tools.conversion.uploading import PENDING
from dsv3_tools.conversion.workspace import Workspace

__all__ = ["Room", "room_for"]


@dataclass(frozen=True)
class Room:
    """Bytes on disks, and over the network.

    Attributes:
        written: of the output shards that are still to be written, as many as are here at once.
        fetched: of the source shards that come from the Hub.
        staged: the most of those that lie beside the output at once; 0 where they go into the cache.
        freed: what the run removes first.
    """

    written: int = 0
    fetched: int = 0
    staged: int = 0
    freed: int = 0

    @property
    def needed(self) -> int:
        """Bytes that the destination's disk must have free."""
        return max(0, self.written + self.staged - self.freed)

    def check(self, destination: Path) -> None:
        """Refuses a run that a disk cannot hold.

        Raises:
            DestinationError: with the bytes free and needed.
        """
        if self.staged or not self.fetched:
            check_room(destination, self.needed)
            return
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        if filesystem(cache) == filesystem(destination):
            check_room(destination, self.needed + self.fetched)
        else:
            check_room(destination, self.needed)
            check_room(cache, self.fetched)


def room_for(
    missing: Sequence[ShardPlan],
    checkpoints: Mapping[str, Checkpoint],
    workspace: Workspace,
    state: State,
    options: RunOptions,
    workers: int,
    scratch: int = 0,
) -> Room:
    """Returns what a run needs.

    Args:
        missing: the shards that are still to be written.
        checkpoints: the sources by origin.
        workspace: of the destination.
        state: of the destination.
        options: of the run.
        workers: of each process.
        scratch: bytes that a maker of weights needs beside them for a while.
    """
    needs = absent_shards(missing, checkpoints)
    absent = {key for keys in needs.values() for key in keys}
    fetched = sum(checkpoints[key.origin].shards[key.name].nbytes for key in absent)
    freed = workspace.temporary_nbytes()
    if state is State.FRESH:
        freed += replaceable_nbytes(workspace.destination)
    staged = 0
    if not options.hub.keep_source:
        freed += workspace.source_nbytes()
        staged = peak_nbytes(needs, checkpoints, options.ranks.world_size * (workers + PREFETCH))
    sizes = sorted((shard.nbytes for shard in missing), reverse=True)
    written = sum(sizes if options.hub.keep_output else sizes[: workers + PENDING])
    return Room(written + (scratch if missing else 0), fetched, staged, freed)
