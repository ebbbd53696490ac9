"""Do two checkpoints hold the same weights? Every tensor accounted for, every weight decoded and compared."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsv3_tools.checkpoint.manifest import QUANTIZATION_NAME
from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import Source, SourceLike
from dsv3_tools.conversion.progress import Meter, Progress, Stop
from dsv3_tools.errors import UsageError
from dsv3_tools.verify.comparison import Comparer
from dsv3_tools.verify.expectations import expectation
from dsv3_tools.verify.pairs import Pair, pair_up
from dsv3_tools.verify.results import FormatResult, TensorResult, by_format, worst
from dsv3_tools.verify.threads import share_out

__all__ = ["TensorReport", "verify_tensors"]

_LARGE_NBYTES = 64 << 20  # begun first, so that none is left to one worker at the end


@dataclass(frozen=True)
class TensorReport:
    """How the candidate's tensors compare with the reference's.

    Attributes:
        reference: the reference's directory.
        candidate: the candidate's.
        num_parameters: parameters that both have, whatever they are stored as.
        num_compared: those whose data were compared.
        sample: how they were chosen; None if all were compared.
        nbytes: bytes of both sides that were compared.
        formats: the results by pair of formats.
        worst: the five weights with the worst results, failures first.
        weights: every result, in the reference's order.
        problems: what must not be.
        notes: what differs and may.
    """

    reference: Source
    candidate: Source
    num_parameters: int
    num_compared: int
    sample: str | None
    nbytes: int
    formats: tuple[FormatResult, ...]
    worst: tuple[TensorResult, ...]
    weights: tuple[TensorResult, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_tensors(
    reference: SourceLike,
    candidate: SourceLike,
    *,
    sample: float | None = None,
    min_snr: float | None = None,
    exact: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
) -> TensorReport:
    """Compares every tensor of two checkpoints, each decoded from whatever format it is in.

    What may differ is known from the formats: BF16 from FP8 must be the float32 product, rounded once; codes
    of INT8 and INT4 must be the nearest to the reference, unless they were calibrated
    (`dsv3_quantization.json` is beside them); what is not quantized must be the same bits.

    Example:
        >>> report = verify_tensors("miniature/checkpoint", "miniature/checkpoint")
        >>> report.passed, report.num_compared == report.num_parameters
        (True, True)

    Args:
        reference: the checkpoint that is right.
        candidate: the one that is to be the same model.
        sample: how many weights to compare, or below 1 the share of them; None is all. That no tensor is
            missing is always checked.
        min_snr: least ratio of signal to error of quantized weights in dB, instead of what the formats
            lead to expect; for codes that another tool has calibrated, which are not the nearest ones.
        exact: allow no error at all but that of rounding to BF16.
        workers: weights compared at once; None is one for each core.
        device: where weights are compared: "cpu".
        seed: of the choice of a sample.
        on_progress: called with every weight, from any thread.
        stop: lets a signal handler end it.

    Returns:
        The findings; a failed check is a finding, not an exception.

    Raises:
        UsageError: options that contradict each other or make no sense.
        CheckpointError: not a checkpoint of the family, or one whose files do not agree.
        FormatError: a quantization that is not known here.
    """
    _check_options(sample, min_snr, exact=exact, device=device)
    stop = stop or Stop()
    with Checkpoint(reference) as ours, Checkpoint(candidate) as theirs:
        pairing = pair_up(ours, theirs)
        calibrated = ours.has_file(QUANTIZATION_NAME) or theirs.has_file(QUANTIZATION_NAME)
        pairs, chosen = _choose(pairing.pairs, sample, seed)
        order = sorted(range(len(pairs)), key=lambda k: _nbytes(pairs[k], ours, theirs) < _LARGE_NBYTES)
        progress = _PairProgress(pairs, ours, theirs, on_progress)

        def make(ended: Stop) -> Callable[[int], TensorResult]:
            comparer = Comparer(ours, theirs, ended)

            def do(number: int) -> TensorResult:
                pair = pairs[number]
                formats = pair.reference.format, pair.candidate.format
                expected = expectation(*formats, exact=exact, min_snr=min_snr, calibrated=calibrated)
                result = comparer.compare(pair, expected)
                progress.add(pair)
                return result

            return do

        found = share_out(order, make, workers or len(os.sched_getaffinity(0)), stop)
        results = [result for _, result in sorted(zip(order, found, strict=True), key=lambda item: item[0])]
        return TensorReport(
            reference=ours.source,
            candidate=theirs.source,
            num_parameters=len(pairing.pairs),
            num_compared=len(pairs),
            sample=chosen,
            nbytes=progress.nbytes,
            formats=by_format(results),
            worst=worst(results),
            weights=tuple(results),
            problems=(*pairing.problems, *(f"{r.name}: {r.problem}" for r in results if r.problem)),
            notes=(*pairing.notes, *_notes(results)),
        )


def _check_options(sample: float | None, min_snr: float | None, *, exact: bool, device: str) -> None:
    if sample is not None and not (0 < sample < 1 or (sample >= 1 and sample == int(sample))):
        raise UsageError(
            f"sample: got {sample:g}, expected a number of weights, or below 1 the share of them"
        )
    if exact and min_snr is not None:
        raise UsageError("--exact and --min-snr contradict each other: one of them")
    if device != "cpu":
        raise UsageError(f"--device {device}: expected cpu; weights are compared where they are read")


def _choose(pairs: Sequence[Pair], sample: float | None, seed: int) -> tuple[Sequence[Pair], str | None]:
    """Returns the weights to compare, in their order, and how they were chosen."""
    if sample is None:
        return pairs, None
    count = min(len(pairs), int(sample) if sample >= 1 else max(1, round(sample * len(pairs))))
    numbers = sorted(random.Random(seed).sample(range(len(pairs)), count))
    return [pairs[k] for k in numbers], f"{count:,} of {len(pairs):,} parameters, seed {seed}"


def _nbytes(pair: Pair, reference: Checkpoint, candidate: Checkpoint) -> int:
    """Returns the bytes of both copies of a weight."""
    sides = ((reference, pair.reference), (candidate, pair.candidate))
    return sum(checkpoint.specs[name].nbytes for checkpoint, w in sides for name in w.parts.values())


class _PairProgress:
    """Counts bytes of both sides, and shards of the candidate."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        reference: Checkpoint,
        candidate: Checkpoint,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._sides = reference, candidate
        self._left = Counter(self._shard(pair) for pair in pairs)
        self._lock = threading.Lock()
        self.nbytes = sum(_nbytes(pair, reference, candidate) for pair in pairs)
        self._meter = Meter(self.nbytes, len(self._left), on_progress)

    def add(self, pair: Pair) -> None:
        """Counts a weight that has been compared."""
        with self._lock:
            self._left[self._shard(pair)] -= 1
            done = self._left[self._shard(pair)] == 0
        self._meter.add(_nbytes(pair, *self._sides), shards=int(done))

    def _shard(self, pair: Pair) -> str:
        return self._sides[1].weight_map[pair.candidate.code_name]


def _notes(results: Sequence[TensorResult]) -> Iterator[str]:
    good = [result for result in results if result.problem is None]
    if names := [result.name for result in good if result.nonfinite]:
        yield f"{len(names)} weights hold NaN or infinity, the same on both sides: {list_names(names)}"
    if names := [result.name for result in good if result.through]:
        yield f"{len(names)} weights were quantized from a BF16 copy of the reference: {list_names(names)}"
