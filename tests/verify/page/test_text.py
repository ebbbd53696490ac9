"""Numbers as people read them, axes that have a place for 0, and elements that escape."""

from __future__ import annotations

import math

import pytest

from dsv3_tools.verify.page.chart_parts import LogAxis, rounded
from dsv3_tools.verify.page.text import (
    Markup,
    duration,
    element,
    figure,
    label,
    listed,
    rise,
    share,
    size,
    visible,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (1, "1.00"), (0.01234, "0.0123"), (0.01, "0.0100"), (0.0001, "0.000100"),
        (0.00009996, "1.00e-4"), (1.2e-13, "1.20e-13"), (99.97, "100"), (123.4, "123"), (12345.6, "12,346"),
        (-0.5, "-0.500"), (math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "-∞"), (5e-324, "4.94e-324"),
    ],
)  # fmt: skip
def test_figure(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "100 %"), (0, "0 %"), (0.98765, "98.77 %"), (0.9999, "99.99 %"), (0.99999, "99.999 %"),
        (0.9999996, "99.99996 %"), (1e-6, "0.0001 %"), (math.nan, "NaN"),
    ],
)  # fmt: skip
def test_share_is_whole_only_if_it_is(value: float, text: str) -> None:
    assert share(value) == text


def test_other_numbers() -> None:
    assert [rise(value) for value in (0.0046, -0.0046, 0.0, 1e-8)] == [
        "+0.460 %",
        "-0.460 %",
        "0 %",
        "+1.00e-6 %",
    ]
    assert [label(value) for value in (0.01, 1e-6, 0.0)] == ["0.01", "1e-06", "0"]
    assert [size(value) for value in (12, 1500, 688.574839e9)] == ["12 bytes", "1.50 kB", "688.57 GB"]
    assert [duration(value) for value in (4.21, 59.96, 751, 7500)] == [
        "4.2 s",
        "60.0 s",
        "12 min 31 s",
        "2 h 05 min",
    ]
    assert [figure(0.0123456, extra) for extra in (0, 2)] == ["0.0123", "0.012346"]


def test_elements_escape_all_but_markup() -> None:
    inner = element("b", "1 < 2", title='"&"')
    assert inner == '<b title="&quot;&amp;&quot;">1 &lt; 2</b>'
    assert (
        element("p", inner, "<i>", class_="a", aria_label="b")
        == f'<p class="a" aria-label="b">{inner}&lt;i&gt;</p>'
    )
    # Control: what says that it is HTML stays as it is; what is made of it is text again.
    assert element("p", Markup("<i>")) == "<p><i></p>"
    assert element("p", Markup("<i>") + "") == "<p>&lt;i&gt;</p>"


def test_visible_text() -> None:
    assert visible("a\tb\r\n\u2028é量", 20) == "a\\tb\\r↵\\u2028é量"
    assert (visible("abcdef", 3), visible("abcdef", 3, end=True), visible("abc", 3)) == (
        "abc…",
        "…def",
        "abc",
    )
    assert listed(["a<", "b", "c"], most=2, length=9) == (
        '<ul><li>a&lt;</li><li>b</li><li class="more">and 1 more</li></ul>'
    )


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1e-6, 1e-2], ["10<sup>-6</sup>", "10<sup>-5</sup>", "0.0001", "0.001", "0.01"]),
        ([2e-5, 6e-4], ["2·10<sup>-5</sup>", "5·10<sup>-5</sup>", "0.0001", "0.0002", "0.0005"]),
        ([0.03, 0.03], ["0.02", "0.05"]),
        ([None, math.nan, 0.3, math.inf], ["0.2", "0.5"]),
        ([1e-30, 1.0], ["10<sup>-27</sup>", "10<sup>-22</sup>"]),
    ],
)
def test_ticks(values: list[float | None], texts: list[str]) -> None:
    axis = LogAxis.of(values)
    assert axis.zero is None
    assert axis.tick_texts[: len(texts)] == texts
    for value in values:
        if value is not None and math.isfinite(value):
            assert axis.low < math.log10(value) < axis.high
            assert axis.place(value) == value


@pytest.mark.parametrize("values", [[0.0], [0.0, 1e-3], [0.0, 1e-9, 1.0], [0.0, 5e-324, 1e300, math.nan]])
def test_zero_is_below_everything(values: list[float]) -> None:
    axis = LogAxis.of(values)
    place, drawn = axis.place(0.0), axis.axis("title")
    assert place is not None and axis.zero is not None
    assert drawn["range"][0] < axis.zero < axis.low
    assert drawn["tickvals"][0] == place and drawn["ticktext"][0] == "0"
    assert (axis.place(None), axis.place(math.nan)) == (None, None)


def test_rounded() -> None:
    assert [rounded(value) for value in (0.0123456, 0.0, -0.0, math.inf)] == [0.0123, 0, 0, None]
    assert str(rounded(-0.0)) == "0"
