"""HTML that escapes what it is given, and numbers as people read them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

__all__ = [
    "Markup",
    "duration",
    "element",
    "figure",
    "join",
    "label",
    "listed",
    "percent_label",
    "rise",
    "section",
    "share",
    "size",
    "table",
    "visible",
]

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_MAX_DECIMALS = 8


class Markup(str):
    """Text that is HTML already; all other text is escaped on its way into an element."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Markup:
    """Returns an element around its children, everything escaped that is no `Markup`.

    Attributes are named as in HTML, with `class_` for class and `_` for a hyphen.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for name, value in attributes.items()
    )
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """Returns the children one after the other, escaped where they are no `Markup`."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def section(title: str, lead: str, *content: str) -> Markup:
    """Returns a section with a title and a sentence on what it shows."""
    return element("section", element("h2", title), element("p", lead, class_="lead"), *content)


def table(head: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], *, title: str, kind: str) -> Markup:
    """Returns a table that scrolls in its own box where the window is too narrow.

    Args:
        head: rows of header cells, complete (`th`) or as text.
        rows: cells; the first of a row names it, and complete ones (`td`, `th`) stay as they are.
        title: what a screen reader calls it.
        kind: class of the table, for its columns' alignment.
    """
    body = [element("tr", *(_cell(cell, first=not i) for i, cell in enumerate(row))) for row in rows]
    top = [element("tr", *(_head(cell) for cell in row)) for row in head]
    inner = join(element("thead", *top), element("tbody", *body))
    return element(
        "div",
        element("table", inner, class_=kind),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=title,
    )


def _head(cell: str) -> Markup:
    is_complete = isinstance(cell, Markup) and cell.startswith("<th")
    return Markup(cell) if is_complete else element("th", cell, scope="col")


def _cell(cell: str, *, first: bool) -> Markup:
    if isinstance(cell, Markup) and cell.startswith(("<td", "<th")):
        return cell
    return element("th", cell, scope="row") if first else element("td", cell)


def visible(text: str, most: int, *, end: bool = False) -> str:
    """Returns text from a file with line ends shown and control characters spelled out, of limited length.

    Args:
        text: may hold anything.
        most: characters; what is cut off is replaced by an ellipsis.
        end: keep the end, not the beginning.
    """
    if len(text) > most:
        text = f"…{text[-most:]}" if end else f"{text[:most]}…"
    return "".join(_spelled(character) for character in text)


def _spelled(character: str) -> str:
    if character == "\n":
        return "↵"
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def listed(texts: Sequence[str], *, most: int, length: int) -> Markup:
    """Returns a list of texts, each of limited length; how many were left out is said last."""
    items = [element("li", visible(text, length)) for text in texts[:most]]
    if len(texts) > most:
        items.append(element("li", f"and {len(texts) - most:,} more", class_="more"))
    return element("ul", *items)


def figure(value: float, extra: int = 0, *, digits: int = 3) -> str:
    """Returns a number with its significant digits, three and `extra` ones: 0.0123, 1.20e-6, 12,345, 0."""
    digits += extra
    if not math.isfinite(value):
        return str(value).replace("nan", "NaN").replace("inf", "∞")
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:#.{digits}g}".rstrip(".")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float, extra: int = 0) -> str:
    """Returns a share in percent, with two decimals and `extra` ones; only the whole reads 100 %."""
    if not math.isfinite(value):
        return figure(value)
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    digits = 2 + extra
    while digits < _MAX_DECIMALS and float(f"{100 * value:.{digits}f}") in (0, 100):
        digits += 1
    return f"{100 * value:.{digits}f} %"


def rise(value: float, extra: int = 0) -> str:
    """Returns a change in percent, with its sign: +0.46 %, -1.20e-5 %, 0 %."""
    return f"{'+' if value > 0 else ''}{figure(100 * value, extra)} %"


def label(value: float) -> str:
    """Returns a number as it was asked for, with no zeros behind: 0.01, 1e-06."""
    return f"{value:.6g}"


def percent_label(value: float) -> str:
    """Returns a share as it was asked for, in percent: 99.5 %."""
    return f"{100 * value:.6g} %"


def size(nbytes: float) -> str:
    """Returns a number of bytes with a decimal unit: 688.57 GB."""
    for unit, factor in _UNITS:
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Returns a time in its two largest units: 4.2 s, 12 min 31 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
