"""What charts are made of, as plotly.js takes it: axes that have a place for 0, lines, limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LogAxis", "Style", "chart_layout", "limit_line", "plain_axis", "rounded", "series"]

_FONT = 'Inter, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif'
_LIMIT_COLOUR = "#c2571a"
_MOST_TICKS = 8
_LEAST_DECADES = 0.6
_FEW_DECADES = 2
_MARGIN = 0.06
_PLACE_OF_ZERO = 0.15


@dataclass(frozen=True)
class Style:
    """How a line looks, in the words of plotly.js."""

    colour: str
    dash: str
    symbol: str

    @property
    def line(self) -> dict[str, Any]:
        """The line itself; a broken one is thinner."""
        return {"color": self.colour, "dash": self.dash, "width": 2 if self.dash == "solid" else 1.4}

    @property
    def marker(self) -> dict[str, Any]:
        """The symbol at each value."""
        return {"color": self.colour, "symbol": self.symbol, "size": 5}


@dataclass(frozen=True)
class LogAxis:
    """A range of a logarithmic axis, in powers of ten, and where 0 is drawn.

    Attributes:
        low: where the range of the positive values begins.
        high: where it ends.
        zero: where zeros are drawn, below `low`; None if there are none.
    """

    low: float
    high: float
    zero: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> LogAxis:
        """Returns the axis for these values; what is None or not finite has no place on it."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        powers = [math.log10(value) for value in known if value > 0] or [0.0]
        low, high = min(powers), max(powers)
        missing = max(0.0, _LEAST_DECADES - (high - low)) / 2
        low, high = low - missing, high + missing
        span = high - low
        zero = low - _PLACE_OF_ZERO * span if 0 in known else None
        return cls(low - _MARGIN * span, high + _MARGIN * span, zero)

    @property
    def ticks(self) -> list[float]:
        """Powers of ten in the range; with their doubles and fivefolds if there are few."""
        first, last = math.floor(self.low), math.ceil(self.high)
        every = math.ceil((last - first) / _MOST_TICKS)
        mantissas = (1, 2, 5) if self.high - self.low < _FEW_DECADES else (1,)
        ticks = [(m, power) for power in range(first, last + 1, every) for m in mantissas]
        return [float(f"{m}e{power}") for m, power in ticks if self.low <= math.log10(m) + power <= self.high]

    @property
    def tick_texts(self) -> list[str]:
        """What stands beside the ticks."""
        return [_tick_text(tick) for tick in self.ticks]

    def place(self, value: float | None) -> float | None:
        """Returns where a value is drawn; None if nowhere."""
        if value == 0 and self.zero is not None:
            return rounded(10**self.zero)
        return None if value is None else rounded(value)

    def axis(self, title: str) -> dict[str, Any]:
        """Returns the axis as plotly.js takes it."""
        begin = self.low if self.zero is None else self.zero - _MARGIN * (self.high - self.low)
        zeros = [] if self.zero is None else [self.place(0)]
        return plain_axis(title) | {
            "type": "log",
            "range": [round(begin, 4), round(self.high, 4)],
            "tickvals": [*zeros, *self.ticks],
            "ticktext": ["0"] * len(zeros) + self.tick_texts,
        }


def _tick_text(tick: float) -> str:
    if 1e-4 <= tick < 1e4:
        return f"{tick:g}"
    mantissa, exponent = f"{tick:.0e}".split("e")
    power = f"10<sup>{int(exponent)}</sup>"
    return power if mantissa == "1" else f"{mantissa}·{power}"


def rounded(value: float, digits: int = 3) -> float | None:
    """Returns a value with so many significant digits; None, a gap, if it is not finite."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}") or 0


def series(
    name: str,
    style: Style,
    numbers: Sequence[int],
    values: Sequence[float | None],
    axis: LogAxis | None,
) -> dict[str, Any]:
    """Returns a line over numbered layers; hovering over it shows the values, wherever they are drawn.

    Args:
        name: for the legend.
        style: of the line.
        numbers: of the layers.
        values: one for each layer; None makes a gap.
        axis: that it is drawn on; None for a linear one, of percentages.
    """
    scale, digits, unit = (1, 3, "") if axis else (100, 6, " %")
    known = [None if value is None else rounded(scale * value, digits) for value in values]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(numbers),
        "y": [axis.place(value) for value in values] if axis else known,
        "customdata": known,
        "line": style.line,
        "marker": style.marker,
        "hovertemplate": f"%{{customdata:.{digits}~g}}{unit}",
    }


def chart_layout(height: int) -> dict[str, Any]:
    """Returns what all charts have in common; the page's style sheet colours text and grid."""
    return {
        "height": height,
        "margin": {"l": 68, "r": 12, "t": 34, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _FONT, "size": 12, "color": "#5b6670"},
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "hoverlabel": {"bgcolor": "#20262c", "bordercolor": "#20262c", "font": {"color": "#fff"}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom"},
        "showlegend": True,
        "shapes": [],
    }


def plain_axis(title: str) -> dict[str, Any]:
    """Returns a linear axis."""
    return {
        "title": {"text": title, "standoff": 10},
        "zeroline": False,
        "gridcolor": "#e1e5e9",
        "ticks": "outside",
        "ticklen": 5,
        "tickcolor": "rgba(0,0,0,0)",
        "automargin": True,
    }


def limit_line(limit: float | None, axis: LogAxis, name: str) -> list[dict[str, Any]]:
    """Returns a horizontal line at a limit; none at 0, where a logarithmic axis has no room for it.

    Args:
        limit: where; None for no line.
        axis: that it is drawn on.
        name: of that axis in the layout.
    """
    if not limit:
        return []
    has_room_above = math.log10(limit) < (axis.low + axis.high) / 2
    label = {
        "text": f"limit {limit:.3g}",
        "textposition": "end",
        "yanchor": "bottom" if has_room_above else "top",
        "font": {"color": _LIMIT_COLOUR, "size": 11},
    }
    line = {"color": _LIMIT_COLOUR, "width": 1.2, "dash": "dashdot"}
    place = {"xref": "x domain", "x0": 0, "x1": 1, "yref": name, "y0": limit, "y1": limit}
    return [{"type": "line", "line": line, "label": label} | place]
