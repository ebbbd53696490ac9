"""What error a weight may have, from the formats on both sides: data, each with its reason.

A weight in integer or FP8 codes is judged twice. Its ratio of signal to error must reach what the format
reaches on any sensible weight, which finds whole weights that are wrong. And every code must be the
nearest there is to the reference, given its scale, which finds a single byte: rounding to nearest errs by
half a step, a wrong code or scale by more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.formats import INT4, Dense, Format, FP8Block, INT8Block, INT8Channel

__all__ = [
    "CALIBRATED_LESS",
    "CLAMP_STEPS",
    "HALF_STEP",
    "INT4_SNR",
    "SNR",
    "Expectation",
    "expectation",
    "label",
]

HALF_STEP = 0.501
"""Largest error in steps: half a step, and a thousandth for rounding in float32 (127 x 2**-23 at most)."""

CLAMP_STEPS = 6.0
"""Largest error in steps beyond the outermost code. A search for the least squared error makes scales down
to 0.64 of the plain one, and then clamps up to 7.5 / 0.64 - 7 = 4.7 steps; others shrink a little more."""

INT4_SNR: dict[int, tuple[float, str]] = {
    32: (18.0, "normal weights in groups of 32 reach 20.5 dB, trained ones 20 to 21"),
    64: (17.0, "normal weights in groups of 64 reach 19.7 dB"),
    128: (16.0, "normal weights in groups of 128 reach 19.1 dB"),
}
"""Least dB by group size, with the reason; a larger group has the last one's less 1 dB."""

SNR: dict[type[Format], tuple[float, str]] = {
    FP8Block: (28.0, "FP8 e4m3 reaches 31.5 dB, whatever the block's spread: its steps grow with the code"),
    INT8Block: (33.0, "normal weights in INT8 blocks reach 40.5 dB, trained ones with outliers 35"),
    INT8Channel: (36.0, "normal weights with an INT8 scale for each row reach 40.9 dB at 7168 columns"),
}
"""Least dB of the other formats, with the reason."""

CALIBRATED_LESS = 6.0
"""What calibration may cost of it: a weight's error grows while its output's shrinks, the more the stronger
its inputs are correlated; 3.8 dB on the shipped model at most."""

_BF16_ROUNDING = 2.0**-8
"""Share of the power of two below an element that rounding it to BF16 moves it by, at most."""

_COARSENESS: tuple[type[Format], ...] = (Dense, FP8Block, INT8Block, INT8Channel, INT4)


@dataclass(frozen=True)
class Expectation:
    """How a weight in one format is to compare with the same weight in another.

    Attributes:
        equality: how the two are compared for equality: "bytes" of the parts, weights "decoded" to float32,
            the wider one "rounded" to the type of the other; None where they cannot be equal.
        lossy: the format in whose steps errors are measured; None where only equality will do.
        swapped: it is the reference's: the candidate is the better copy of the two.
        slack: share of the power of two below an element by which the finer side may itself be rounded.
        min_snr: least ratio of signal to error in dB, where equality is not asked for.
        nearest: every code must be the nearest to the finer side.
        reason: why this is expected.
    """

    equality: str | None
    lossy: Format | None = None
    swapped: bool = False
    slack: float = 0.0
    min_snr: float | None = None
    nearest: bool = False
    reason: str = ""


def expectation(
    reference: Format,
    candidate: Format,
    *,
    exact: bool = False,
    min_snr: float | None = None,
    calibrated: bool = False,
) -> Expectation:
    """Returns what is expected of `candidate` against `reference`.

    Args:
        reference: how the reference stores a weight.
        candidate: how the candidate does.
        exact: nothing but equality passes.
        min_snr: least dB of quantized weights, instead of everything known here.
        calibrated: one of the two was quantized with calibration: its codes make up for each other's errors,
            and are not the nearest.
    """
    equality, reason = _equality(reference, candidate)
    if isinstance(reference, Dense) and isinstance(candidate, Dense):
        return Expectation(equality, reason=reason)
    if exact:
        return Expectation(equality or "decoded", reason="--exact was asked for")
    if min_snr is not None:
        lossy = _coarser(reference, candidate)
        return Expectation(equality, lossy, lossy is not candidate, min_snr=min_snr, reason="--min-snr")
    if reason:
        return Expectation(equality, reason=reason)
    lossy = _coarser(reference, candidate)
    least, reason = _least_snr(lossy)
    if calibrated and isinstance(lossy, (INT4, INT8Channel)):
        reason = f"calibrated codes need not be the nearest ones, which reach {least:g} dB"
        return Expectation(
            equality, lossy, lossy is not candidate, min_snr=least - CALIBRATED_LESS, reason=reason
        )
    slack = _BF16_ROUNDING if Dense("BF16") in (reference, candidate) else 0.0
    return Expectation(equality, lossy, lossy is not candidate, slack, least, True, reason)


def label(fmt: Format) -> str:
    """Returns a format's name, with what tells its variants apart."""
    if isinstance(fmt, INT4):
        kind = "" if fmt.symmetric else " asymmetric"
        return f"{fmt.name} {'rows' if fmt.group_size == -1 else f'g{fmt.group_size}'}{kind}"
    if isinstance(fmt, FP8Block) and fmt.scale_fmt != "f32":
        return f"{fmt.name} {fmt.scale_fmt}"
    return fmt.name


def _equality(reference: Format, candidate: Format) -> tuple[str | None, str]:
    """Returns how equality shows, and, where it is a must, why."""
    if isinstance(reference, Dense) and isinstance(candidate, Dense):
        if reference == candidate:
            return "bytes", "unquantized tensors are copied"
        wide = max(reference, candidate, key=lambda fmt: DTYPES[fmt.dtype].bits)
        narrow = candidate if wide is reference else reference
        return "rounded", f"{wide.dtype} rounded once to {narrow.dtype} is all that may differ"
    if reference.same_bytes(candidate):
        return "bytes", "the same format has the same codes and scales"
    if candidate.same_bytes(reference):  # scales are to be powers of two now: perhaps they all were
        return "bytes", ""
    if isinstance(reference, INT4) and isinstance(candidate, INT4) and _same_grid(reference, candidate):
        return "decoded", "layouts of the same groups hold the same codes and scales"
    if isinstance(candidate, Dense):
        return "rounded", f"decoding is a float32 product, rounded once to {candidate.dtype}"
    return ("rounded" if isinstance(reference, Dense) else None), ""


def _same_grid(a: INT4, b: INT4) -> bool:
    """Whether both hold the same scales and codes; some formats may be told apart by their zero points."""
    return replace(a, symmetric=True).same_grid(replace(b, symmetric=True)) and a.symmetric == b.symmetric


def _coarser(reference: Format, candidate: Format) -> Format:
    """Returns the format with the larger error, the candidate's if in doubt."""

    def rank(fmt: Format) -> int:
        return max(number for number, kind in enumerate(_COARSENESS) if isinstance(fmt, kind))

    return reference if rank(reference) > rank(candidate) else candidate


def _least_snr(fmt: Format) -> tuple[float, str]:
    if not isinstance(fmt, INT4):
        return SNR[type(fmt)]
    known = [size for size in INT4_SNR if 0 < fmt.group_size <= size]
    if known:
        return INT4_SNR[min(known)]
    least, reason = INT4_SNR[max(INT4_SNR)]
    return least - 1.0, f"{reason}, larger ones a little less"
