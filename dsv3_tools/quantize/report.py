"""The quantization report: what calibration has gained, layer by layer, as JSON beside the checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.manifest import MAX_QUANTIZATION_BYTES, QUANTIZATION_NAME
from dsv3_tools.checkpoint.paths import read_small_file
from dsv3_tools.quantize.figures import LayerFigures, MatrixFigures

__all__ = [
    "KindOverview",
    "LayerSummary",
    "encode_report",
    "overview",
    "read_report",
    "summarize",
]

_VERSION = 1


@dataclass(frozen=True)
class LayerSummary:
    """One kind of weight in one layer.

    Gains are in dB, over rounding to the nearest code with scales of the largest weight.

    Attributes:
        layer: its number.
        kind: "experts.gate_up", "experts.down_proj", "self_attn.o_proj", ...
        num_matrices: how many.
        predicted_gain: what the Hessians promise over the nearest code, on their own tokens.
        gain: measured on held-out tokens; None without any.
        error: of held-out outputs, relative, not squared; None without any.
        least_tokens: of the matrix with the fewest.
        few_tokens: matrices with fewer tokens than inputs.
        largest_damping: of any of them.
        without_factor: matrices that were only rounded, because no factor could be had.
    """

    layer: int
    kind: str
    num_matrices: int
    predicted_gain: float
    gain: float | None
    error: float | None
    least_tokens: int
    few_tokens: int
    largest_damping: float | None
    without_factor: int


def encode_report(record: Mapping[str, object], layers: Mapping[int, LayerFigures]) -> bytes:
    """Returns the report: a summary, then every matrix; no time in it, so that equal runs give equal ones."""
    document = {
        "report_version": _VERSION,
        **record,
        "summary": [asdict(line) for line in summarize(list(layers.values()))],
        "expert_outputs": [
            {"layer": number, "relative_error": _ratio(*figures.output_error)}
            for number, figures in sorted(layers.items())
            if figures.expert_tokens
        ],
        "layers": [asdict(figures) for _, figures in sorted(layers.items())],
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def summarize(layers: Sequence[LayerFigures]) -> list[LayerSummary]:
    """Returns a line for each kind of weight of each layer."""
    lines = []
    for figures in sorted(layers, key=lambda one: one.number):
        kinds: dict[str, list[MatrixFigures]] = {}
        for matrix in figures.matrices:
            kinds.setdefault(_kind(matrix.name), []).append(matrix)
        lines += [_line(figures.number, kind, found) for kind, found in kinds.items()]
    return lines


def _line(layer: int, kind: str, found: Sequence[MatrixFigures]) -> LayerSummary:
    signal, error = sum(one.signal for one in found), sum(one.error for one in found)
    absmax = sum(one.absmax_error for one in found)
    logs = [math.log10(max(one.predicted_gain, 1e-9)) for one in found]
    dampings = [one.damping for one in found if one.damping is not None]
    return LayerSummary(
        layer=layer,
        kind=kind,
        num_matrices=len(found),
        predicted_gain=10.0 * sum(logs) / len(logs),
        gain=10.0 * math.log10(absmax / error) if error > 0.0 and absmax > 0.0 else None,
        error=_ratio(error, signal),
        least_tokens=min(one.tokens for one in found),
        few_tokens=sum(one.tokens < one.inputs for one in found),
        largest_damping=max(dampings, default=None),
        without_factor=len(found) - len(dampings),
    )


def _ratio(error: float, signal: float) -> float | None:
    return math.sqrt(error / signal) if signal > 0.0 else None


def _kind(name: str) -> str:
    parts = name.split(".")
    return ".".join(part for part in parts if not part.isdigit())


def read_report(directory: Path) -> dict[str, Any]:
    """Returns the report that lies in a directory; empty if there is none, or none that is known."""
    if not (directory / QUANTIZATION_NAME).is_file():
        return {}
    try:
        document = json.loads(read_small_file(directory, QUANTIZATION_NAME, MAX_QUANTIZATION_BYTES))
    except (ValueError, RecursionError):
        return {}
    known = isinstance(document, dict) and document.get("report_version") == _VERSION
    return document if known and isinstance(document.get("summary"), list) else {}


@dataclass(frozen=True)
class KindOverview:
    """One kind of weight over all layers: means of what `LayerSummary` has, and its extremes."""

    kind: str
    layers: int
    num_matrices: int
    predicted_gain: float
    gain: float | None
    error: float | None
    least_tokens: int
    few_tokens: int
    largest_damping: float | None
    without_factor: int


def overview(document: Mapping[str, Any]) -> list[KindOverview]:
    """Returns a line for each kind of weight, from a report."""
    kinds: dict[str, list[LayerSummary]] = {}
    for entry in document.get("summary", ()):
        try:
            line = LayerSummary(**entry)
        except TypeError:  # edited by hand
            return []
        kinds.setdefault(line.kind, []).append(line)
    return [
        KindOverview(
            kind=kind,
            layers=len(lines),
            num_matrices=sum(line.num_matrices for line in lines),
            predicted_gain=_mean([line.predicted_gain for line in lines]) or 0.0,
            gain=_mean([line.gain for line in lines if line.gain is not None]),
            error=_mean([line.error for line in lines if line.error is not None]),
            least_tokens=min(line.least_tokens for line in lines),
            few_tokens=sum(line.few_tokens for line in lines),
            largest_damping=max(
                (line.largest_damping for line in lines if line.largest_damping is not None), default=None
            ),
            without_factor=sum(line.without_factor for line in lines),
        )
        for kind, lines in kinds.items()
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
