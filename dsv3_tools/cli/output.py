"""What is printed: results on stdout, everything else on stderr, nothing interpreted as markup."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.source import HubRepo
from dsv3_tools.conversion.card_text import nbytes as size
from dsv3_tools.conversion.card_text import printable

__all__ = ["as_json", "print_error", "print_json", "print_line", "print_note", "print_table", "size"]


def print_line(text: str = "") -> None:
    """Prints a line of the result, at once: logs and pipes show the plan before the run has ended."""
    print(printable(text), flush=True)


def print_note(text: str) -> None:
    """Prints a line about the run, on stderr."""
    print(printable(text), file=sys.stderr)


def print_table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> None:
    """Prints rows in columns; numbers (anything that starts with a digit) to the right."""
    if not rows:
        return
    widths = [max(len(printable(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            printable(cell).rjust(width) if cell[:1].isdigit() else printable(cell).ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        print((indent + "  ".join(cells)).rstrip(), flush=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Prints the one JSON document of a `--json` run."""
    print(json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False), flush=True)


def print_error(message: str, code: int, *, as_json: bool, kind: str = "Interrupted") -> None:
    """Prints an error as one line on stderr, and as the JSON document of a `--json` run."""
    line = printable(message)
    print(f"dsv3: {line}", file=sys.stderr)
    if as_json:
        print_json({"error": {"kind": kind, "message": line}, "exit_code": code})


def as_json(value: Any) -> Any:
    """Returns a result as JSON values: dataclasses as objects, paths as strings, NaN and infinity as null."""
    if isinstance(value, (Path, HubRepo)):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
