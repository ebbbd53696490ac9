"""Is a checkpoint what its own `config.json` says? Headers, index and shapes, then what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_tools.checkpoint.dtypes import DTYPES, FLOAT_DTYPES
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import Source, SourceLike, parse_source
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.plan import SOURCE
from dsv3_tools.conversion.planning import read_stored, recode_step
from dsv3_tools.conversion.preflight import content_problems
from dsv3_tools.conversion.progress import Meter, Progress, Stop
from dsv3_tools.errors import CheckpointError, Dsv3Error, NetworkError
from dsv3_tools.formats import Dense
from dsv3_tools.formats.stored import StoredWeight
from dsv3_tools.verify.inspection import flaws, read_what_is_stored, remarks
from dsv3_tools.verify.pairs import part_problems
from dsv3_tools.verify.threads import share_out

__all__ = ["StructureReport", "verify_structure"]

_CHUNK_NBYTES = 4 << 20
_SCANNED = FLOAT_DTYPES | {"F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class StructureReport:
    """What was found.

    Attributes:
        directory: the checkpoint.
        data: whether tensors were read, or headers only.
        num_tensors: tensors of the checkpoint.
        nbytes: bytes of tensors that were read.
        problems: what an engine would refuse or misread.
        notes: what is odd, but does no harm.
    """

    directory: Source
    data: bool
    num_tensors: int
    nbytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class _Task:
    """Something to be read: a tensor, the scales and fixed parts of a weight, or a copy and its original."""

    nbytes: int
    tensor: str | None = None
    weight: StoredWeight | None = None
    copy: tuple[str, str] | None = None


def verify_structure(
    directory: SourceLike,
    *,
    data: bool = True,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
) -> StructureReport:
    """Checks that a checkpoint is complete and sound in itself, without another one to compare it with.

    Example:
        >>> report = verify_structure("miniature/checkpoint")
        >>> report.passed, report.num_tensors
        (True, 619)

    Args:
        directory: the checkpoint.
        data: read the tensors, too: NaN and infinity, scales, parts that follow from the shape, whether the
            MTP module's embedding and head are the main model's. Otherwise headers alone.
        workers: tensors read at once; None is one for each core.
        on_progress: called with every piece read, from any thread.
        stop: lets a signal handler end it.

    Returns:
        The findings; a failed check is a finding, not an exception.

    Raises:
        CheckpointError: `directory` is no directory.
    """
    folder = parse_source(directory)
    if isinstance(folder, Path) and not folder.is_dir():
        raise CheckpointError(f"{folder}: is no directory, expected a checkpoint")
    try:
        opened = Checkpoint(folder)
    except NetworkError:
        raise
    except Dsv3Error as error:
        return StructureReport(folder, data, 0, 0, (str(error),), ())
    with opened as checkpoint:
        stored, problem = read_what_is_stored(checkpoint)
        problems = list(flaws(checkpoint, stored, problem))
        if problem is None:
            stored = read_stored(checkpoint)
        quantized = [weight for weight in stored.weights if not isinstance(weight.format, Dense)]
        whole = [w for w in quantized if all(name in checkpoint.specs for name in w.parts.values())]
        wrong = {w.code_name: [*part_problems(checkpoint, w)] for w in whole}
        problems += [text for texts in wrong.values() for text in texts]
        notes = list(remarks(checkpoint, stored))
        tasks: list[_Task] = []
        if data:
            tasks = list(_tasks(checkpoint, [w for w in whole if not wrong[w.code_name]]))
            found = _read(checkpoint, tasks, workers, on_progress, stop or Stop())
            problems += [text for task, texts in found for text in texts if task.copy is None]
            notes += [text for task, texts in found for text in texts if task.copy is not None]
        nbytes = sum(task.nbytes for task in tasks)
        place = checkpoint.source
        return StructureReport(place, data, len(checkpoint.specs), nbytes, tuple(problems), tuple(notes))


def _tasks(checkpoint: Checkpoint, weights: Sequence[StoredWeight]) -> Iterator[_Task]:
    """Yields what is to be read, large tensors first, so that none is left to one worker at the end."""
    scanned = [name for name, spec in checkpoint.specs.items() if spec.dtype in _SCANNED]
    for name in sorted(scanned, key=lambda name: -checkpoint.specs[name].nbytes):
        yield _Task(checkpoint.specs[name].nbytes, tensor=name)
    for copy, original in _mtp_copies(checkpoint):
        yield _Task(2 * checkpoint.specs[copy].nbytes, copy=(copy, original))
    for weight in weights:
        others = [name for part, name in weight.parts.items() if part != weight.format.weight_part]
        yield _Task(sum(checkpoint.specs[name].nbytes for name in others), weight=weight)


def _mtp_copies(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yields the MTP module's tensors that are copies of the main model's, with their originals."""
    head = "model.embed_tokens.weight" if checkpoint.config.tie_word_embeddings else "lm_head.weight"
    for layer in checkpoint.config.mtp_layers:
        for own, original in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", head),
        ):
            copy = f"model.layers.{layer}.{own}"
            specs = checkpoint.specs
            if copy in specs and original in specs and specs[copy] == specs[original]:
                yield copy, original


def _read(
    checkpoint: Checkpoint,
    tasks: Sequence[_Task],
    workers: int | None,
    on_progress: Callable[[Progress], None] | None,
    stop: Stop,
) -> list[tuple[_Task, list[str]]]:
    """Returns what is wrong with the data, task by task."""
    meter = Meter(sum(task.nbytes for task in tasks), 0, on_progress)

    def make(ended: Stop) -> Callable[[_Task], tuple[_Task, list[str]]]:
        reader = _Reader(checkpoint, ended, meter)

        def do(task: _Task) -> tuple[_Task, list[str]]:
            if task.tensor is not None:
                return task, reader.nonfinite(task.tensor)
            if task.copy is not None:
                return task, reader.differs(*task.copy)
            assert task.weight is not None
            meter.add(task.nbytes)
            step = recode_step(task.weight, Dense("BF16"))
            return task, content_problems(step, {SOURCE: checkpoint})

        return do

    return share_out(tasks, make, workers or len(os.sched_getaffinity(0)), stop)


class _Reader:
    """One worker, with buffers of its own."""

    def __init__(self, checkpoint: Checkpoint, stop: Stop, meter: Meter) -> None:
        self._checkpoint, self._stop, self._meter = checkpoint, stop, meter
        self._buffers = [memoryview(bytearray(_CHUNK_NBYTES)) for _ in range(2)]

    def nonfinite(self, name: str) -> list[str]:
        """Returns what there is of NaN and infinity in a tensor."""
        import numpy as np

        from dsv3_tools.kernels.nonfinite import count_nonfinite, first_nonfinite

        spec, count, first = self._checkpoint.specs[name], 0, 0
        for start, nbytes in _chunks(spec):
            data = np.frombuffer(self._fill(0, name, start, nbytes), np.uint8)
            found = count_nonfinite(data, spec.dtype)
            if found and not count:
                first = start * 8 // DTYPES[spec.dtype].bits + (first_nonfinite(data, spec.dtype) or 0)
            count += found
        if not count:
            return []
        place = ", ".join(str(int(i)) for i in np.unravel_index(first, spec.shape))
        return [f"{name}: {count:,} elements are NaN or infinite, the first at [{place}]"]

    def differs(self, copy: str, original: str) -> list[str]:
        """Returns a remark if a tensor is not the same as another of the same type and shape."""
        for start, nbytes in _chunks(self._checkpoint.specs[copy]):
            if self._fill(0, copy, start, nbytes) != self._fill(1, original, start, nbytes):
                return [f"{copy} differs from {original}, of which released checkpoints hold a copy there"]
        return []

    def _fill(self, number: int, name: str, start: int, nbytes: int) -> memoryview:
        self._stop.check()
        buffer = self._buffers[number][:nbytes]
        self._checkpoint.read_into(name, start, buffer)
        self._meter.add(nbytes)
        return buffer


def _chunks(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    for start in range(0, spec.nbytes, _CHUNK_NBYTES):
        yield start, min(_CHUNK_NBYTES, spec.nbytes - start)
