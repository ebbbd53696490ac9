"""What `verify tensors` finds of a weight, and of all weights in a format."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FormatResult", "TensorResult", "by_format", "worst"]

_NUM_WORST = 5


@dataclass(frozen=True)
class TensorResult:
    """How one weight of the candidate compares with the reference's.

    Attributes:
        name: its name in an unquantized checkpoint.
        reference_format: how the reference stores it.
        candidate_format: how the candidate does.
        num_elements: elements of the weight.
        num_equal: those that are what they are expected to be, bit by bit.
        snr: ratio of signal to error in dB; None where there is no error.
        max_error: largest error, relative to the weight's largest magnitude.
        max_steps: largest error in steps of the codes; None where it was not measured.
        worst_block: first row and column of the 128 x 128 block with the largest sum of squared errors.
        nonfinite: elements that are NaN or infinite, on either side.
        problem: what is wrong; None if it is as expected.
        through: "BF16" if the candidate's codes are those of the reference after rounding to BF16.
    """

    name: str
    reference_format: str
    candidate_format: str
    num_elements: int
    num_equal: int
    snr: float | None = None
    max_error: float = 0.0
    max_steps: float | None = None
    worst_block: tuple[int, int] | None = None
    nonfinite: int = 0
    problem: str | None = None
    through: str | None = None

    @property
    def exact(self) -> float:
        """Share of the elements that are equal."""
        return self.num_equal / self.num_elements if self.num_elements else 1.0


@dataclass(frozen=True)
class FormatResult:
    """The weights that are in one format in the reference, and in one in the candidate.

    Attributes:
        reference: the format in the reference.
        candidate: the format in the candidate.
        num_weights: weights and other tensors compared.
        num_elements: their elements.
        exact: share of the elements that are equal.
        least_snr: the lowest ratio of signal to error of a weight in dB; None where there is no error.
        median_snr: the median of those with an error; None where there is none.
        failed: weights that are not as expected.
    """

    reference: str
    candidate: str
    num_weights: int
    num_elements: int
    exact: float
    least_snr: float | None
    median_snr: float | None
    failed: int


def by_format(results: Sequence[TensorResult]) -> tuple[FormatResult, ...]:
    """Returns the results by pair of formats."""
    groups: dict[tuple[str, str], list[TensorResult]] = {}
    for result in results:
        groups.setdefault((result.reference_format, result.candidate_format), []).append(result)
    found = []
    for (reference, candidate), members in groups.items():
        elements = sum(result.num_elements for result in members)
        snrs = [result.snr for result in members if result.snr is not None]
        found.append(
            FormatResult(
                reference,
                candidate,
                len(members),
                elements,
                sum(result.num_equal for result in members) / max(1, elements),
                min(snrs, default=None),
                statistics.median(snrs) if snrs else None,
                sum(result.problem is not None for result in members),
            )
        )
    return tuple(found)


def worst(results: Sequence[TensorResult]) -> tuple[TensorResult, ...]:
    """Returns the five worst results, failures first; none that is without error."""
    odd = [result for result in results if result.num_equal < result.num_elements or result.problem]
    return tuple(sorted(odd, key=_badness)[:_NUM_WORST])


def _badness(result: TensorResult) -> tuple[bool, float]:
    """Returns what sorts failures first, then those with the lowest ratio of signal to error."""
    return result.problem is None, math.inf if result.snr is None else result.snr
