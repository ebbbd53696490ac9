"""Shards of a result go to the Hub while others are still being made, and may leave this disk then.

What makes them a model, index, config, card and manifest, comes in the last commit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv3_tools.conversion.destination import State
from dsv3_tools.conversion.hub_target import LAST_MESSAGE, HubTarget, PushTarget
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.conversion.workspace import Workspace

__all__ = ["PENDING", "Finished", "Uploader", "check_target", "own_shards"]

_BATCH = 4
"""Shards in a commit: the Hub counts commits."""

PENDING = 2 * _BATCH
"""Finished shards that may wait here before workers wait, too."""

_POLL_SECONDS = 0.2

_LAST_SECONDS = 5.0
"""What a commit that nobody waits for any more gets; huggingface_hub cannot be stopped within one."""


def own_shards(plan: Plan, workspace: Workspace, state: State) -> dict[str, str | None]:
    """Returns the shards of a result, with the SHA-256 of those that an earlier run has made."""
    journal = workspace.read_journal() if state is State.RESUME else {}
    return {s.name: journal[s.name].sha256 if s.name in journal else None for s in plan.shards}


def check_target(target: PushTarget, own: Mapping[str, str | None]) -> None:
    """Refuses a target that has another model, without a change to it.

    Raises:
        DestinationError: it has.
        NetworkError: the Hub cannot be asked.
    """
    hub = HubTarget(target, "")
    hub.make_way(hub.files_if_any(), own, overwrite=False)


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard that is done."""

    name: str
    sha256: str


class Uploader:
    """The thread that uploads shards as they are finished.

    Args:
        target: where to.
        title: of the commits.
        directory: where the shards are.
        keep: leave them there.
        total: shards of the whole result.
        stop: ends uploading.
    """

    def __init__(
        self, target: PushTarget, title: str, directory: Path, *, keep: bool, total: int, stop: Stop
    ) -> None:
        self.hub = HubTarget(target, title, stop.check)
        self._directory, self._keep, self._total, self._stop = directory, keep, total, stop
        self._waiting: list[Finished] = []
        self._done: dict[str, str] = {}
        self._changed = threading.Condition()
        self._ending = self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._upload_all, name="dsv3 uploads", daemon=True)

    def begin(self, own: Mapping[str, str | None], *, overwrite: bool) -> dict[str, str]:
        """Makes the model if need be; returns the SHA-256 of those shards that are there, by name.

        Args:
            own: all shards of the result, with their SHA-256 as far as they are made.
            overwrite: replace another model.

        Raises:
            DestinationError: another model is there.
            NetworkError: the Hub cannot be reached, or refuses.
        """
        self.hub.prepare()
        there = self.hub.files_if_any()
        self.hub.make_way(there, own, overwrite=overwrite)
        self._done = {name: sha256 for name, sha256 in there.items() if sha256 and own.get(name) == sha256}
        return dict(self._done)

    def __enter__(self) -> Uploader:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_LAST_SECONDS)

    def add(self, shard: Finished) -> None:
        """Takes a finished shard, unless the Hub has it already."""
        with self._changed:
            if self._done.get(shard.name) == shard.sha256:
                self._leave(shard)
            else:
                self._waiting.append(shard)
                self._changed.notify_all()

    def wait(self, check: Callable[[], None]) -> None:
        """Returns when there is room for one shard more.

        Raises:
            NetworkError: uploading has failed.
            Interrupted: by `check`, which is called every now and then.
        """
        with self._changed:
            while len(self._waiting) >= PENDING and self._failure is None:
                check()
                self._changed.wait(_POLL_SECONDS)
            self._raise_failure()

    def finish(self, small: Mapping[str, Path | bytes], expected: Mapping[str, str]) -> str:
        """Uploads what is left, then the small files in one last commit; returns its hash.

        Args:
            small: the small files, by name.
            expected: SHA-256 of every shard, by name.

        Raises:
            CheckpointError: the Hub does not have what was written.
            NetworkError: uploading has failed.
            Interrupted: somebody has asked to stop.
        """
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)
            self._stop.check()
        self._raise_failure()
        self.hub.check(expected)
        return self.hub.commit(small, LAST_MESSAGE)

    def _upload_all(self) -> None:
        try:
            while batch := self._next_batch():
                first, *_, last = sorted(shard.name for shard in batch * 2)
                names = first if first == last else f"{first} … {last}"
                paths = {shard.name: self._directory / shard.name for shard in batch}
                self.hub.commit(paths, f"{names}, of {self._total} shards")
                with self._changed:
                    if self._closed:  # the shards may be another run's by now
                        return
                    for shard in batch:
                        self._waiting.remove(shard)
                        self._done[shard.name] = shard.sha256
                        self._leave(shard)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next_batch(self) -> list[Finished]:
        """Returns what to upload next, as soon as it is worth a commit; nothing at the end."""
        with self._changed:
            while not (len(self._waiting) >= _BATCH or self._ending or self._is_over()):
                self._changed.wait(_POLL_SECONDS)
            return [] if self._is_over() else self._waiting[:_BATCH]

    def _is_over(self) -> bool:
        return self._closed or self._stop.is_set

    def _leave(self, shard: Finished) -> None:
        if not self._keep:
            (self._directory / shard.name).unlink(missing_ok=True)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
