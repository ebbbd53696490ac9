"""Markdown that says what it is given: names come from files that may be hostile."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

__all__ = ["code", "escape", "fenced", "nbytes", "printable", "shell", "table"]

_MARKUP = re.compile(r"([\\`*\[\]<>#|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def printable(text: str) -> str:
    """Returns `text` with control characters and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape(text: str) -> str:
    """Returns `text` as Markdown that shows exactly it, in a table as well."""
    return _MARKUP.sub(r"\\\1", printable(text))


def code(text: str) -> str:
    """Returns `text` as a code span; one with marks that no span can show in a table becomes plain text."""
    shown = printable(text)
    return escape(text) if not shown.strip() or "`" in shown or "|" in shown else f"`{shown}`"


def fenced(lines: Sequence[str], language: str) -> list[str]:
    """Returns a code block, whose fence is longer than any in it."""
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, *lines, fence]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table; cells are Markdown, columns after the first whose cells begin with digits go right."""
    if not rows:
        return []
    numbers = [n > 0 and all(row[n][:1].isdigit() for row in rows) for n in range(len(heads))]
    marks = ["---:" if right else "---" for right in numbers]
    return [f"| {' | '.join(row)} |" for row in (heads, marks, *rows)]


def shell(words: Sequence[str]) -> str:
    """Returns a command line of one line, whatever is in its words."""
    return " ".join(shlex.quote(w) if w.isprintable() else f"$'{_c_string(w)}'" for w in words)


def nbytes(number: float) -> str:
    """Returns a number of bytes with a decimal unit: 688.57 GB."""
    for unit, factor in _UNITS:
        if abs(number) >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} bytes"


def _c_string(word: str) -> str:
    return printable(word.replace("\\", "\\\\").replace("'", "\\'"))
