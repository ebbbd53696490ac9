"""Compares one weight of two checkpoints: for equality first, and where that fails, by its errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsv3_tools.conversion.progress import Stop
from dsv3_tools.formats import Dense
from dsv3_tools.verify.equality import common_dtype, count_if_equal, rows_at_once
from dsv3_tools.verify.expectations import CLAMP_STEPS, HALF_STEP, Expectation, label
from dsv3_tools.verify.pairs import Pair
from dsv3_tools.verify.results import TensorResult
from dsv3_tools.verify.sides import Side, bits_of
from dsv3_tools.verify.stripes import DECODED_ELEMENTS, STORED_ELEMENTS, Buffers, matrix_shape, stripes

if TYPE_CHECKING:
    from dsv3_tools.checkpoint.reader import Checkpoint
    from dsv3_tools.kernels.compare import BlockErrors, Steps

__all__ = ["Comparer"]


class Comparer:
    """One worker: compares a weight at a time, in buffers of its own."""

    def __init__(self, reference: Checkpoint, candidate: Checkpoint, stop: Stop) -> None:
        self._checkpoints = reference, candidate
        self._stop = stop
        self._buffers = Buffers()

    def compare(self, pair: Pair, expected: Expectation) -> TensorResult:
        """Returns how a weight compares."""
        reference = Side(self._checkpoints[0], pair.reference, self._buffers, "reference")
        candidate = Side(self._checkpoints[1], pair.candidate, self._buffers, "candidate")
        rows, columns = matrix_shape(pair.reference.shape)
        result = TensorResult(
            pair.name,
            label(pair.reference.format),
            label(pair.candidate.format),
            rows * columns,
            rows * columns,
        )
        wrong = [*reference.fixed_problems(), *candidate.fixed_problems()]
        if wrong:
            return replace(result, problem=wrong[0])
        if expected.equality is not None:
            shape, buffers = pair.reference.shape, self._buffers
            nonfinite = count_if_equal(reference, candidate, expected.equality, shape, buffers, self.check)
            if nonfinite is not None:
                return replace(result, nonfinite=nonfinite)
        measured = _Measurement(self, reference, candidate, pair, expected)
        found = measured.result(result)
        if measured.has_wrong_code and not expected.swapped and not isinstance(reference.format, Dense):
            again = _Measurement(self, reference, candidate, pair, expected, through="BF16").result(result)
            if again.problem is None:
                return replace(found, problem=None, through="BF16")
        return found

    def check(self) -> None:
        """Ends the work if somebody has asked for that."""
        self._stop.check()


class _Measurement:
    """The errors of a weight that is not equal; `through` rounds the reference to that type beforehand."""

    def __init__(
        self,
        comparer: Comparer,
        reference: Side,
        candidate: Side,
        pair: Pair,
        expected: Expectation,
        *,
        through: str | None = None,
    ) -> None:
        from dsv3_tools.kernels.compare import BlockErrors

        self._through = through
        self._comparer, self._pair, self._expected = comparer, pair, expected
        self._reference, self._candidate = reference, candidate
        self._shape = pair.reference.shape
        self._errors: BlockErrors = BlockErrors.zeros(*matrix_shape(self._shape))
        self._nonfinite = self._differing_nonfinite = 0
        self._bad_scales = False
        self._has_steps = False
        self._first: str | None = None  # where elements differ first
        self._farthest: tuple[float, str] = (0.0, "")  # the largest error in steps, and where it is
        self._first_nonfinite = ""

    def result(self, result: TensorResult) -> TensorResult:
        """Returns `result` with the errors and the verdict."""
        formats = self._reference.format, self._candidate.format
        elements = STORED_ELEMENTS if self._through is None else DECODED_ELEMENTS
        for stripe in stripes(self._shape, formats, elements):
            self._comparer.check()
            if self._expected.lossy is None or not self._measure_codes(*stripe):
                for part in stripes(self._shape, formats, within=stripe):
                    self._comparer.check()
                    self._measure_decoded(*part)
        self._locate()
        errors = self._errors
        signal, error = float(errors.signal.sum()), float(errors.error.sum())
        peak = float(errors.peak.max())
        found = replace(
            result,
            num_equal=int(errors.same.sum()) - self._differing_nonfinite,
            snr=_decibels(signal, error),
            max_error=float(errors.largest.max()) / peak if peak else 0.0,
            max_steps=float(errors.steps.max()) if self._has_steps else None,
            worst_block=_worst_block(errors),
            nonfinite=self._nonfinite,
        )
        return replace(found, problem=self._problem(found), snr=None if found.snr == -math.inf else found.snr)

    @property
    def has_wrong_code(self) -> bool:
        """Whether a code is not the nearest one."""
        return self._expected.nearest and self._farthest[0] > HALF_STEP

    def _measure_codes(self, top: int, height: int) -> bool:
        """Measures codes without decoding them first; returns whether that is possible."""
        from dsv3_tools.kernels.cpu_errors import Coded, measure_codes

        finer, other = self._reference, self._candidate
        if self._expected.swapped:
            finer, other = other, finer
        at_once = rows_at_once(finer, other)
        if self._through is None:
            original = finer.coded(top, height, at_once)
        else:
            original = Coded.floats(bits_of(finer.decode(finer.read(top, height), self._through)[0]))
        codes = other.coded(top, height, at_once)
        if original is None or codes is None:
            return False
        slack, clamp = self._expected.slack, CLAMP_STEPS / HALF_STEP
        farthest = measure_codes(
            original, codes, self._errors, rows=height, top=top, slack=slack, clamp=clamp
        )
        self._has_steps |= farthest is not None
        return farthest is not None

    def _measure_decoded(self, top: int, height: int) -> None:
        """Measures weights of any formats, with whatever numbers in them."""
        import numpy as np

        from dsv3_tools.kernels.compare import compare_blocks

        expected = self._expected
        a, b, nonfinite, steps = self._decoded(top, height)
        self._has_steps |= steps is not None
        if nonfinite:
            a, b = self._without_nonfinite(a, b, top)
        if self._first is None and expected.lossy is None and (a != b).any():
            place = np.unravel_index(int(np.argmax(a != b)), a.shape)
            self._first = self._place(top, place, b[place].view(np.float32), a[place].view(np.float32))
        compare_blocks(
            a, b, self._errors, top=top, steps=steps, slack=expected.slack, clamp=CLAMP_STEPS / HALF_STEP
        )

    def _decoded(self, top: int, height: int) -> tuple[Any, Any, int, Steps | None]:
        """Returns both sides' weights as bits, the finer one first, how many are not finite, and steps."""
        ours, theirs = self._reference.read(top, height), self._candidate.read(top, height)
        steps, usable = None, True
        if self._expected.lossy is None:
            dtype = common_dtype(self._reference, self._candidate)
            original, count = self._reference.decode(ours, dtype)
            other, more = self._candidate.decode(theirs, dtype)
            original, other = original.float(), other.float()
        elif self._expected.swapped:
            original, count = self._candidate.decode(theirs, _finest(self._candidate))
            other, more, steps, usable = self._reference.decode_with_steps(ours)
        else:
            original, count = self._reference.decode(ours, self._through or _finest(self._reference))
            other, more, steps, usable = self._candidate.decode_with_steps(theirs)
        self._bad_scales |= not usable
        width = matrix_shape(self._shape)[1]
        return bits_of(original).reshape(-1, width), bits_of(other).reshape(-1, width), count + more, steps

    def _without_nonfinite(self, a: Any, b: Any, top: int) -> tuple[Any, Any]:
        """Returns both with zeros where one is not finite, having counted and named those."""
        import numpy as np

        a, b = _as_float32(a), _as_float32(b)
        bad = ~(np.isfinite(a) & np.isfinite(b))
        self._differing_nonfinite += int((bad & (a.view(np.uint32) != b.view(np.uint32))).sum())
        self._nonfinite += int(bad.sum())
        if not self._first_nonfinite and bad.any():
            place = np.unravel_index(int(np.argmax(bad)), bad.shape)
            self._first_nonfinite = self._place(top, place, b[place], a[place])
        return np.where(bad, np.float32(0), a).view(np.uint32), np.where(bad, np.float32(0), b).view(
            np.uint32
        )

    def _locate(self) -> None:
        """Notes the most steps if they are too many, and their block's element with the largest error."""
        import numpy as np

        from dsv3_tools.kernels.compare import BLOCK

        steps = self._errors.steps
        if self._nonfinite or not steps.size or steps.max() <= HALF_STEP:
            return
        row, column = map(int, np.unravel_index(int(np.argmax(steps)), steps.shape))
        columns, largest = slice(column * BLOCK, (column + 1) * BLOCK), -1.0
        formats = self._reference.format, self._candidate.format
        for top, height in stripes(self._shape, formats):
            rows = slice(max(0, row * BLOCK - top), max(0, (row + 1) * BLOCK - top))
            if rows.start >= height or rows.stop == 0:
                continue
            a, b, _, _ = self._decoded(top, height)
            values, coded = _as_float32(a[rows, columns]), _as_float32(b[rows, columns])
            errors = np.abs(values - coded)
            place = np.unravel_index(int(np.argmax(errors)), values.shape)
            if errors[place] > largest:
                largest = float(errors[place])
                moved = (int(place[0]) + int(rows.start), int(place[1]) + int(columns.start))
                self._farthest = (float(steps.max()), self._place(top, moved, coded[place], values[place]))

    def _place(self, top: int, place: Any, found: Any, expected: Any) -> str:
        """Returns an element's index and what stands there, on the candidate's side and the reference's."""
        if self._expected.swapped:
            found, expected = expected, found
        index = (
            f"{top + int(place[0])}" if len(self._shape) < 2 else f"{top + int(place[0])}, {int(place[1])}"
        )
        return f"at [{index}] is {float(found):.6g}, the reference has {float(expected):.6g}"

    def _difference(self, found: TensorResult) -> str | None:
        """Returns what is wrong with elements that should be equal."""
        differing = found.num_elements - found.num_equal
        if not differing:
            return None
        return (
            f"{differing:,} of {found.num_elements:,} elements differ: the first {self._first}; expected "
            f"equal ones ({self._expected.reason})"
        )

    def _problem(self, found: TensorResult) -> str | None:
        """Returns what is wrong with the weight, the worst first; None if nothing is."""
        expected = self._expected
        if self._nonfinite:
            return f"{self._nonfinite:,} elements are not finite on one side or both: {self._first_nonfinite}"
        if self._bad_scales and expected.nearest:
            return "has scales that are 0 or not finite"
        if expected.lossy is None:
            return self._difference(found)
        assert expected.min_snr is not None
        if found.snr is not None and not found.snr >= expected.min_snr:
            return (
                f"the ratio of signal to error is {found.snr:.1f} dB, expected at least {expected.min_snr:g} "
                f"({expected.reason}); the worst block begins at {list(found.worst_block or ())}"
            )
        steps, where = self._farthest
        if self.has_wrong_code:
            return (
                f"an element is {steps:.3g} steps from the reference, expected at most half a step: a code "
                f"or scale is wrong; {where}"
            )
        return None


def _finest(side: Side) -> str:
    """Returns the type in which nothing of a side is lost, of those that the kernel takes."""
    return "BF16" if side.format == Dense("BF16") else "F32"


def _as_float32(bits: Any) -> Any:
    import numpy as np

    wide = bits.astype(np.uint32) << 16 if bits.dtype == np.uint16 else bits
    return np.ascontiguousarray(wide).view(np.float32)


def _decibels(signal: float, error: float) -> float | None:
    """Returns a ratio of sums of squares in dB; None without error. Float32 squares may be infinite."""
    if error == 0:
        return None
    return 10 * math.log10(signal / error) if signal > 0 and error < math.inf else -math.inf


def _worst_block(errors: BlockErrors) -> tuple[int, int] | None:
    import numpy as np

    from dsv3_tools.kernels.compare import BLOCK

    if not errors.error.any():
        return None
    row, column = np.unravel_index(int(np.argmax(errors.error)), errors.error.shape)
    return int(row) * BLOCK, int(column) * BLOCK
