"""Figures of `dsv3 verify` for a card: a few of each report, kept beside the result that they are of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.header import load_json
from dsv3_tools.checkpoint.manifest import (
    FIGURES_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    manifest_sha256,
    parse_manifest,
)
from dsv3_tools.checkpoint.paths import read_small_file
from dsv3_tools.errors import CheckpointError, HeaderError, UsageError

__all__ = ["Figures", "encode_figures", "read_figures", "read_report"]

MAX_REPORT_BYTES = 100_000_000

Figures = Mapping[str, Mapping[str, str]]
"""By report ("tensors", "logits", "mtp"): figures, as a card shows them, by name."""

_RUNS = {"replayed": "same experts", "free": "own choice of experts"}


def read_report(path: Path, directory: Path, sha256: str) -> tuple[str, dict[str, str]]:
    """Returns which report a file holds, and its main figures.

    Args:
        path: what `dsv3 verify logits|tensors|mtp --json` printed.
        directory: the result that it must be about.
        sha256: what that result's manifest states of itself.

    Raises:
        CheckpointError: the file is not such a document.
        UsageError: it is about another directory.
    """
    report = _load(path)
    kind = _kind(report)
    if kind is None:
        raise CheckpointError(f"{path}: is not what dsv3 verify logits, tensors or mtp print with --json")
    try:
        about = [report["candidate"]] if kind != "mtp" else [report["module"], report["directory"]]
        if not any(_is_about(Path(place), directory, sha256) for place in about):
            raise UsageError(f"{path}: is about {about[0]}, expected {directory}")
        figures = _READERS[kind](report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: is not a report of dsv3 verify {kind}: {type(error).__name__} {error}"
        ) from None
    return kind, figures


def read_figures(directory: Path, sha256: str) -> dict[str, Mapping[str, str]]:
    """Returns the figures that are kept in a directory; none if they are of another result.

    Raises:
        CheckpointError: the file is not one of this program.
    """
    if not (directory / FIGURES_NAME).exists():
        return {}
    where = str(directory / FIGURES_NAME)
    document = _parse(read_small_file(directory, FIGURES_NAME, MAX_REPORT_BYTES), where)
    found = document.get("figures")
    if not isinstance(found, dict) or not all(
        isinstance(table, dict) and all(isinstance(value, str) for value in table.values())
        for table in found.values()
    ):
        raise CheckpointError(f"{where}: not figures of dsv3-tools; remove it")
    return found if document.get("manifest_sha256") == sha256 else {}


def encode_figures(figures: Figures, sha256: str) -> bytes:
    """Returns the text of the file that keeps figures."""
    document = {"manifest_sha256": sha256, "figures": figures}
    return (json.dumps(document, indent=2, ensure_ascii=True) + "\n").encode()


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > MAX_REPORT_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_REPORT_BYTES:,} bytes, too large for a report")
    return _parse(text, str(path))


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        document = load_json(text, where)
    except HeaderError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{where}: is not a JSON object")
    return document


def _kind(report: Mapping[str, Any]) -> str | None:
    marks = {"tensors": "num_compared", "logits": "runs", "mtp": "drafts"}
    return next((kind for kind, key in marks.items() if key in report and "passed" in report), None)


def _is_about(place: Path, directory: Path, sha256: str) -> bool:
    """Whether a report's place is `directory`, or a copy of it; a place elsewhere is known by its name."""
    if place.exists():
        return place.resolve() == directory.resolve() or _own_sha256(place) == sha256
    return place.name == directory.resolve().name


def _own_sha256(place: Path) -> str | None:
    try:
        text = read_small_file(place, MANIFEST_NAME, MAX_MANIFEST_BYTES)
        return manifest_sha256(parse_manifest(text, MANIFEST_NAME))
    except CheckpointError:
        return None


def _tensors(report: Mapping[str, Any]) -> dict[str, str]:
    compared, total = int(report["num_compared"]), int(report["num_parameters"])
    figures = {"passed": _yes(report["passed"]), "parameters compared": f"{compared:,} of {total:,}"}
    for found in report["formats"]:
        name = f"{found['reference']} to {found['candidate']}"
        share, least = float(found["exact"]), found["least_snr"]
        shown = f"{found['num_weights']:,} weights, {_share(share)} of the elements as expected"
        figures[name] = shown if least is None else f"{shown}, at least {least:.1f} dB"
    return figures


def _logits(report: Mapping[str, Any]) -> dict[str, str]:
    figures = {
        "passed": _yes(report["passed"]),
        "tokens": f"{report['tokens']}, {report['dtype']}",
        "perplexity, reference": _number(report["perplexity"], ".4f"),
    }
    for name, title in _RUNS.items():
        run = report["runs"].get(name)
        if run is not None:
            figures[f"KL to the reference, {title}"] = f"{_number(run['kl'], '.3g')} nats"
            figures[f"top-1 agreement, {title}"] = _number(run["top1"], ".2%")
            figures[f"perplexity, {title}"] = _number(run["perplexity"], ".4f")
    return figures


def _mtp(report: Mapping[str, Any]) -> dict[str, str]:
    figures = {"passed": _yes(report["passed"]), "tokens": f"{report['tokens']}, {report['dtype']}"}
    for draft, expected in zip(report["drafts"], report["expected_tokens"], strict=True):
        accepted = _number(draft["acceptance"], ".2%")
        figures[f"draft {int(draft['number'])} accepted"] = f"{accepted}, {float(expected):.3f} tokens a step"
    return figures


_READERS = {"tensors": _tensors, "logits": _logits, "mtp": _mtp}


def _yes(passed: object) -> str:
    return "yes" if passed is True else "no"


def _number(value: Any, style: str) -> str:
    """Returns a figure; "not finite" for what JSON has no number for."""
    return "not finite" if value is None or not math.isfinite(float(value)) else format(float(value), style)


def _share(share: float) -> str:
    """Returns a share; 100 % only if nothing is missing from it."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9999):.4f} %"
