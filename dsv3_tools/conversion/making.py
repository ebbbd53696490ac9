"""Shards whose weights are made during the run, in memory, instead of being read and recoded.

Whoever makes them (calibrated quantization, layer by layer) hands over a few shards at a time with the parts
of their weights. These are written in the background, while the next are made, as copies from one more
origin; what else belongs into the shard is recoded from the source as in any run.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsv3_tools.conversion.buffers import as_bytes
from dsv3_tools.conversion.plan import ShardPlan, Step, TensorRef
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.conversion.workspace import JournalEntry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MADE", "Made", "MadeWeights", "Maker", "Place", "made_shard", "write_made"]

MADE = "made"
"""The origin of parts that a run has made."""


class MadeWeights:
    """Parts of weights in host memory, for the pipelines that otherwise read a checkpoint.

    Args:
        parts: by tensor name.
    """

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self._bytes = {name: as_bytes(part) for name, part in parts.items()}
        self.weight_map = dict.fromkeys(parts, MADE)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from byte `start` on."""
        buffer[:] = self._bytes[name][start : start + len(buffer)]

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        """Does nothing: everything is in memory."""

    def check_unchanged(self, shard: str) -> None:
        """Does nothing: nobody else can write to it."""


@dataclass(frozen=True)
class Made:
    """Shards that can be written now; without any, all earlier ones are to be on disk before going on.

    Attributes:
        shards: with steps that copy from the origin `MADE`, see `made_shard`.
        weights: what these steps copy.
    """

    shards: Sequence[ShardPlan] = ()
    weights: MadeWeights | None = None


@dataclass(frozen=True)
class Place:
    """Where and how weights are made.

    Attributes:
        folder: in the working folder, for what makes it possible to go on; goes away with that.
        destination: of the run.
        device: "cpu", "cuda:0", ...
        ranks: the processes that make them together.
        stop: asks to stop.
        own: names of the shards that this rank writes: of the others it need not hand over any weight.
        on_progress: called with every step.
    """

    folder: Path
    destination: Path
    device: str
    ranks: Ranks
    stop: Stop
    own: Container[str]
    on_progress: Callable[[Progress], None] | None = None


class Maker(Protocol):
    """Makes the weights of a plan's shards."""

    @property
    def scratch_nbytes(self) -> int:
        """The most that is in its folder at once."""

    def forecast(self, device: str, world_size: int) -> Mapping[str, Any]:
        """Returns what making the weights will take, by name; may try the device for a few seconds."""

    def make(self, missing: Sequence[ShardPlan], place: Place) -> Generator[Made]:
        """Yields all of the `missing` shards, some at a time, in the same order on every rank.

        Raises:
            Dsv3Error: they cannot be made.
        """

    def files(self, place: Place) -> dict[str, bytes]:
        """Returns small files for the destination, when all shards have been made, by this run or earlier.

        Raises:
            DestinationError: what they are made of is gone.
        """


def made_shard(shard: ShardPlan, is_made: Callable[[Step], bool]) -> ShardPlan:
    """Returns the same shard, with the outputs of some steps copied from the origin `MADE`."""
    return replace(shard, steps=tuple(_copy(step) if is_made(step) else step for step in shard.steps))


def _copy(step: Step) -> Step:
    inputs = {part: TensorRef(name, MADE) for part, name in step.outputs.items()}
    assert step.target is not None
    return replace(step, inputs=inputs, source=step.target, dtype=step.target.code_dtype)


def write_made(
    batches: Generator[Made], write: Callable[[Made], Mapping[str, JournalEntry]]
) -> dict[str, JournalEntry]:
    """Writes what is made, in a thread of its own, at most one batch behind; returns the journal's entries.

    Args:
        batches: of a maker.
        write: writes the shards of a batch that are this rank's.

    Raises:
        Dsv3Error: they could not be made or written.
    """
    written: dict[str, JournalEntry] = {}
    pending: Future[Mapping[str, JournalEntry]] | None = None
    with closing(batches), ThreadPoolExecutor(1, "dsv3-made") as pool:
        for batch in batches:
            if pending is not None:
                written |= pending.result()
            pending = pool.submit(write, batch) if batch.shards else None
        if pending is not None:
            written |= pending.result()
    return written
