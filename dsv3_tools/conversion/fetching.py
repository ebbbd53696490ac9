"""Shards of a source on the Hub: fetched a few ahead of the workers, removed when nobody needs them any more.

At any moment there are the shards that the workers read, those for the next outputs, and those that a later
output needs as well (scales may lie in another shard than their codes).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.plan import ShardPlan, TensorRef
from dsv3_tools.conversion.progress import Stop

__all__ = ["PREFETCH", "Fetcher", "SourceShard", "absent_shards", "fetch_for", "peak_nbytes"]

PREFETCH = 2
"""Outputs beyond the workers' own for which shards are fetched."""

_DOWNLOADS = 3
"""Shards fetched at once: one connection to the Hub rarely has all the bandwidth."""

_POLL_SECONDS = 0.2

_LAST_SECONDS = 2.0
"""What a download gets that nobody waits for any more; it can be ended after every 10 MiB."""


class SourceShard(NamedTuple):
    """A shard of one of a run's checkpoints."""

    origin: str
    name: str


def absent_shards(
    shards: Sequence[ShardPlan], checkpoints: Mapping[str, Checkpoint]
) -> dict[str, tuple[SourceShard, ...]]:
    """Returns, by output shard, which source shards it needs that are not here for good."""
    absent = {
        SourceShard(origin, name)
        for origin, checkpoint in checkpoints.items()
        for name in checkpoint.shards
        if not checkpoint.is_kept(name)
    }
    if not absent:
        return {shard.name: () for shard in shards}
    return {
        shard.name: tuple(key for key in _sources(shard, checkpoints) if key in absent) for shard in shards
    }


def peak_nbytes(
    needs: Mapping[str, Sequence[SourceShard]], checkpoints: Mapping[str, Checkpoint], window: int
) -> int:
    """Returns a bound on the bytes of source shards that are here at once, in whatever order outputs end.

    Those for so many outputs as are worked on or fetched for at once, the largest, and those that wait for a
    later output.

    Args:
        needs: as `absent_shards` returns it, in the order of work.
        checkpoints: by origin.
        window: outputs that are worked on or fetched for at once.
    """
    sizes = {key: checkpoints[key.origin].shards[key.name].nbytes for keys in needs.values() for key in keys}
    at_once = sorted((sum(sizes[key] for key in keys) for keys in needs.values()), reverse=True)[:window]
    users = Counter(key for keys in needs.values() for key in keys)
    waiting = sum(nbytes for key, nbytes in sizes.items() if users[key] > 1)
    return min(sum(sizes.values()), sum(at_once) + waiting)


def fetch_for(
    refs: Sequence[TensorRef],
    checkpoints: Mapping[str, Checkpoint],
    folder: Path | None,
    check: Callable[[], None],
) -> None:
    """Brings the shards of some tensors here."""
    for ref in refs:
        checkpoint = checkpoints[ref.origin]
        checkpoint.fetch(checkpoint.weight_map[ref.name], _place(folder, ref.origin), check)


class Fetcher:
    """The threads that fetch what a process's workers need.

    Args:
        needs: as `absent_shards` returns it, in the order of work.
        checkpoints: by origin.
        folder: where shards are for a while; None keeps them in the Hugging Face cache.
        window: outputs that are worked on or fetched for at once.
        stop: ends fetching.
    """

    def __init__(
        self,
        needs: Mapping[str, Sequence[SourceShard]],
        checkpoints: Mapping[str, Checkpoint],
        *,
        folder: Path | None,
        window: int,
        stop: Stop,
    ) -> None:
        self._needs = needs
        self._checkpoints = checkpoints
        self._folder = folder
        self._window = window
        self._stop = stop
        self._uses = Counter(key for keys in needs.values() for key in keys)
        self._unfinished = dict.fromkeys(needs)
        self._begun: set[SourceShard] = set()
        self._here: set[SourceShard] = set()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._closed = False
        count = min(_DOWNLOADS, len(self._uses))
        self._threads = [threading.Thread(target=self._fetch_all, daemon=True) for _ in range(count)]

    def __enter__(self) -> Fetcher:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_LAST_SECONDS)

    def wait(self, output: str) -> None:
        """Returns when everything is here that an output shard needs.

        Raises:
            NetworkError: it could not be had.
            DestinationError: it could not be written.
            Interrupted: somebody has asked to stop.
        """
        needed = set(self._needs[output])
        with self._changed:
            while not needed <= self._here:
                if self._failure is not None:
                    raise self._failure
                self._stop.check()
                self._changed.wait(_POLL_SECONDS)

    def release(self, output: str) -> None:
        """Takes note that an output shard is done; removes what no other one needs."""
        with self._changed:
            del self._unfinished[output]
            self._uses.subtract(self._needs[output])
            done = [key for key in self._needs[output] if not self._uses[key]]
        for key in done:
            self._checkpoints[key.origin].discard(key.name)
        with self._changed:  # only now is there room for others
            self._changed.notify_all()

    def _fetch_all(self) -> None:
        try:
            while (key := self._next()) is not None:
                folder = _place(self._folder, key.origin)
                self._checkpoints[key.origin].fetch(key.name, folder, self._check)
                with self._changed:
                    self._here.add(key)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _next(self) -> SourceShard | None:
        """Returns what to fetch next, as soon as there is room for it; None if there is nothing left."""
        with self._changed:
            while not self._is_over():
                within = list(self._unfinished)[: self._window]
                for key in (key for output in within for key in self._needs[output]):
                    if key not in self._begun:
                        self._begun.add(key)
                        return key
                self._changed.wait(_POLL_SECONDS)
        return None

    def _is_over(self) -> bool:
        """Whether nothing more is to be fetched."""
        ended = self._closed or self._stop.is_set or self._failure is not None
        return ended or len(self._begun) == len(self._uses)

    def _check(self) -> None:
        """Ends a download that nobody waits for any more."""
        self._stop.check()
        if self._closed:
            raise ConnectionAbortedError("the run has ended")


def _sources(shard: ShardPlan, checkpoints: Mapping[str, Checkpoint]) -> dict[SourceShard, None]:
    """Returns the source shards of an output in the order in which it reads them."""
    refs = (ref for step in shard.steps for ref in step.inputs.values())
    return dict.fromkeys(
        SourceShard(ref.origin, checkpoints[ref.origin].weight_map[ref.name]) for ref in refs
    )


def _place(folder: Path | None, origin: str) -> Path | None:
    return None if folder is None else folder / origin
