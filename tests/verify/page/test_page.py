"""The page of a comparison: all of the report is there, nothing is fetched, nothing leaves its place."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from dsv3_tools.errors import DestinationError, UsageError
from dsv3_tools.verify.logits_results import RUNS, Divergence, LogitsReport, Thresholds
from dsv3_tools.verify.page.charts import draw
from dsv3_tools.verify.page.page import render_page, require_plotly, write_page
from tests.verify.page.reports import Page, faults, make, make_equal

MAX_NBYTES = 5_000_000
COMMAND = "dsv3 verify logits /models/original /models/converted --report page.html"
HOSTILE = """</script><script>alert(1)</script><img src="https://x.invalid/a" onerror='go()'>&amp;$style"""
FAILING = Thresholds(
    "int4",
    max_kl=1e-4,
    min_top1=0.9999,
    min_top5=0.5,
    max_logit_error=1e-5,
    max_free_kl=5.0,
    max_perplexity_rise=0.0001,
    max_block_error=0.01,
    max_expert_error=0.01,
    max_router_error=0.01,
)


def page_of(report: LogitsReport) -> Page:
    return Page(render_page(report, COMMAND))


def charts_of(page: Page) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    charts: dict[str, Any] = json.loads(page.scripts[0], parse_constant=refuse)
    return charts


def number(text: str) -> float:
    text = text.removeprefix("✗ ").replace(",", "")
    return float(text.removesuffix(" %")) / 100 if text.endswith(" %") else float(text)


def test_everything_of_a_failing_report_is_there_in_order() -> None:
    problems = ("layer 3: routed expert 7 (0.913)", "KL(reference || candidate) is 0.4 nats")
    page = page_of(replace(make(), thresholds=FAILING, problems=problems))
    assert page.headings == [
        "Failed: 2 problems",
        "What was compared",
        "All tokens",
        "MTP layer 5",
        "Where errors arise",
        "Hidden states",
        "Each layer by itself",
        "Choice of experts",
        "Divergence by position",
        "Worst tokens",
        "Worst experts",
        "Notes",
    ]
    texts = [
        "Failed: 2 problems", *problems, "/models/original", "fp8_block, bf16", "/models/converted",
        "int4_g128, bf16", "tokens.npy, 4 x 384; 1,536 in all", "BF16; weights",
        "cuda:0 (H200), cuda:1 (H200)",
        "mean KL ≤ 0.0001; top-1 agreement ≥ 99.99 %", "1.23 GB of weights read, in 12 min 31 s", COMMAND,
        "embedding 0.00123, final norm and lm_head 0.00456", "the candidate has no chat template",
    ]  # fmt: skip
    places = [page.text.find(text) for text in texts]
    assert places == sorted(places) and places[0] >= 0
    assert page.text.index("replayed 3 of ") < page.text.index("noise, free 6 of ")


@pytest.mark.parametrize("noise", [True, False])
def test_every_figure_stands_in_its_column(noise: bool) -> None:
    report = make(noise=noise)
    page = page_of(report)
    for title, runs in (("figures of all tokens", report.runs), ("figures of MTP layer 5", report.mtp[0])):
        rows = page.tables[title]
        assert rows[1] == ["replayed", "free"] * (1 + noise)
        for row, name in zip(rows[2:], asdict(report.runs["free"]), strict=False):
            shown = [number(cell) for cell in row[1:]]
            expected = [getattr(runs[run], name) for run in RUNS if run in runs]
            assert shown == pytest.approx(expected, rel=0.005), name
    rises = [number(cell) for cell in page.tables["figures of all tokens"][12][1:]]
    assert rises == pytest.approx([found.perplexity / 6.5 - 1 for found in report.runs.values()], rel=0.005)


def test_limits_stand_beside_their_figures() -> None:
    rows = page_of(replace(make(), thresholds=FAILING)).tables["figures of all tokens"]
    assert rows[1] == ["replayed", "limit", "free", "limit", "replayed", "free"]
    limits = [(row[2], row[4]) for row in rows[2:] if row[2] or row[4]]
    assert limits == [
        ("≤ 0.0001 ✗", "≤ 5 ✓"),
        ("≥ 99.99 % ✗", ""),
        ("≥ 50 % ✓", ""),
        ("≤ 1e-05 ✗", ""),
        ("≤ +0.01 % ✗", ""),
    ]


def test_negative_control_without_limits_nothing_is_missed() -> None:
    page = page_of(make())
    assert page.headings[0] == "Passed"
    assert "✗" not in page.text and "✓" not in page.text
    assert page.tables["figures of all tokens"][1] == ["replayed", "free", "replayed", "free"]


def test_a_missed_value_reads_differently_from_its_limit() -> None:
    report = make()
    replayed = replace(report.runs["replayed"], kl=0.0100001, top1=0.989999)
    report = replace(report, runs={**report.runs, "replayed": replayed})
    rows = page_of(replace(report, thresholds=Thresholds("x", max_kl=0.01, min_top1=0.99))).tables[
        "figures of all tokens"
    ]
    assert (rows[2][1], rows[6][1]) == ("0.0100001", "98.9999 %")
    assert (rows[2][2], rows[6][2]) == ("≤ 0.01 ✗", "≥ 99 % ✗")


def test_every_layer_is_in_the_table() -> None:
    report = replace(make(), thresholds=FAILING)
    rows = page_of(report).tables["figures of every layer"][2:]
    for row, layer in zip(rows, report.layers, strict=True):
        errors = [*layer.hidden.values(), layer.attention, layer.mlp, layer.join, layer.router]
        routes = [layer.routes.get("free"), layer.routes.get("noise_free"), layer.rerouted]
        assert row[0].startswith(f"{layer.number} ")
        for cell, value in zip(row[1:], [*errors, *routes], strict=True):
            assert (cell == "") == (value is None)
            assert value is None or number(cell) == pytest.approx(value, rel=0.005, abs=5e-5)
        missed = [error is not None and error > 0.01 for error in errors[4:]]
        assert [cell.startswith("✗") for cell in row[5:9]] == missed


def test_worst_tokens_and_experts() -> None:
    report = replace(make(), thresholds=FAILING)
    page = page_of(report)
    for row, token in zip(page.tables["worst tokens"][1:], report.worst, strict=True):
        assert row[1] == f"sequence {token.sequence} token {token.position}"
        assert row[2] == f"…{token.context[-240:]}"
        assert row[3:] == [f"is{token.position - 7} 87.50 %", f"was{token.position - 7} 75.00 %"]
    experts = sorted(
        ((e.error, layer.number, e) for layer in report.layers for e in layer.experts), reverse=True
    )
    rows = page.tables["worst experts"]
    assert rows[0] == ["expert", "error, limit ≤ 0.01", "tokens"]
    for row, (error, layer, expert) in zip(rows[1:], experts[:10], strict=True):
        assert row[0] == f"layer {layer}, expert {expert.number}"
        assert number(row[1]) == pytest.approx(error, rel=0.005)
        assert row[1].startswith("✗") == (error > 0.01)
        assert row[2] == f"{expert.num_tokens:,}"
    assert len(page.tables["worst experts of every layer"]) == 1 + 5


def test_an_equal_candidate_has_statements_in_place_of_charts() -> None:
    page = page_of(replace(make_equal(noise=False), thresholds=Thresholds("lossless", max_kl=0.0)))
    assert charts_of(page) == {} and 'class="chart"' not in page.html
    assert page.headings[0] == "Passed"
    assert "Every logit of the candidate equals the reference's." in page.text
    for statement in (
        "Every hidden state is equal: the error is 0 in all 6 layers, in all 12 stretches of tokens.",
        "All runs have equal hidden states",
        "Every block is equal",
        "Every router gives equal scores",
        "Every token is sent to the same experts",
        "every KL divergence is 0",
        "replayed 1,536 of 1,536; free 1,536 of 1,536",
        "No position differs.",
        "No routed expert differs.",
    ):
        assert statement in page.text


def test_beside_the_noise_an_equal_candidate_is_drawn_at_zero() -> None:
    charts = charts_of(page_of(make_equal()))
    assert list(charts) == ["hidden", "routes", "kl"]
    axis = charts["hidden"]["layout"]["yaxis"]
    replayed = charts["hidden"]["data"][0]
    assert axis["ticktext"][0] == "0"
    assert set(replayed["y"]) == {axis["tickvals"][0]} and set(replayed["customdata"]) == {0}
    assert axis["range"][0] < math.log10(axis["tickvals"][0]) < math.log10(axis["tickvals"][1])


def test_negative_control_one_difference_is_no_equality() -> None:
    report = make_equal(noise=False)
    values = [list(row) for row in report.heat.values]
    values[3][5] = 1e-6
    report = replace(report, heat=replace(report.heat, values=tuple(map(tuple, values))))
    report = replace(report, runs={**report.runs, "free": replace(report.runs["free"], max_logit_error=1e-6)})
    page = page_of(report)
    assert "Every logit of the candidate" not in page.text and "Every hidden state is equal" not in page.text
    scale, zero = charts_of(page)["heat"]["data"]
    assert scale["customdata"] == values and zero["name"] == "equal (0)"


@pytest.mark.parametrize("change", [make, make_equal, lambda: make(layers=64, columns=128)])
def test_charts_are_what_plotly_takes(change: Callable[[], LogitsReport]) -> None:
    for name, chart in draw(replace(change(), thresholds=FAILING)).items():
        go.Figure(chart)
        for key in ("data", "layout"):
            with pytest.raises(ValueError, match="nonsense"):  # control: plotly does look
                go.Figure(
                    {**chart, key: [{"type": "heatmap", "nonsense": 1}] if key == "data" else {"nonsense": 1}}
                )
        assert name in ("heat", "hidden", "blocks", "routes", "kl")


def test_charts_have_the_report_s_values() -> None:
    report = replace(make(), thresholds=FAILING)
    charts = charts_of(page_of(report))
    heat = charts["heat"]["data"][0]
    assert heat["x"] == [*report.heat.starts, 1536] and heat["y"] == list(report.heat.layers)
    assert charts["heat"]["layout"]["yaxis"]["title"]["text"] == "layer (5: MTP)"
    for drawn, row in zip(heat["customdata"], report.heat.values, strict=True):
        assert drawn == pytest.approx(row, rel=0.05)
    lines = {
        (name, trace["name"]): trace["y"]
        for name in charts
        for trace in charts[name]["data"][:4]
        if "y" in trace and "name" in trace
    }
    assert lines["hidden", "BF16 noise, free"] == pytest.approx(
        [layer.hidden["noise_free"] for layer in report.layers], rel=0.005
    )
    assert lines["blocks", "attention"] == pytest.approx([x.attention for x in report.layers], rel=0.005)
    assert lines["routes", "candidate, free"] == pytest.approx(
        [100 * layer.routes["free"] for layer in report.layers if layer.routes], rel=1e-4
    )
    assert lines["kl", "candidate, replayed"] == list(report.histogram.counts["replayed"])
    limits = [shape["y0"] for shape in charts["blocks"]["layout"]["shapes"]]
    assert limits == [0.01, 0.01]


def test_what_is_not_finite_is_said() -> None:
    nan = math.nan
    report = make()
    layers = tuple(
        replace(layer, hidden={**layer.hidden, "free": nan}, mlp=math.inf) for layer in report.layers
    )
    heat = replace(report.heat, values=((nan,) * 12, *report.heat.values[1:]))
    runs = {**report.runs, "replayed": Divergence(*[nan] * 10)}
    worst = (replace(report.worst[0], kl=math.inf, candidate_probability=nan),)
    page = page_of(
        replace(
            report, layers=layers, heat=heat, runs=runs, worst=worst, thresholds=FAILING, problems=("NaN",)
        )
    )
    assert page.tables["figures of all tokens"][2][1:3] == ["NaN", "≤ 0.0001 ✗"]
    assert page.tables["figures of every layer"][2][2] == "NaN"
    assert page.tables["figures of every layer"][2][6] == "✗ ∞"
    assert page.tables["worst tokens"][1][0] == "∞"
    assert [trace.get("name") for trace in charts_of(page)["heat"]["data"]] == [None, "not finite"]


def hostile_report() -> LogitsReport:
    report = make()
    token = replace(report.worst[0], context=HOSTILE, reference=HOSTILE, candidate="a\u202eb\x00\ud800\n")
    return replace(
        report,
        reference=Path(f"/models/{HOSTILE.replace('/', '_')}"),
        candidate=Path("/models/a\udcffb"),
        tokens=HOSTILE,
        devices=(HOSTILE,),
        formats=((HOSTILE,), (HOSTILE,)),
        thresholds=Thresholds(HOSTILE, max_kl=0.5),
        worst=(token,),
        problems=(HOSTILE, HOSTILE + "x" * 1000),
        notes=(HOSTILE,),
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    write_page(hostile_report(), tmp_path / "page.html", command=f"dsv3 {HOSTILE}")
    page = Page((tmp_path / "page.html").read_text())
    assert faults(page.html) == []
    assert page.text.count(HOSTILE) >= 8
    assert page.tables["worst tokens"][1][2] == HOSTILE
    assert page.tables["worst tokens"][1][4].startswith("a\\u202eb\\x00\\ud800↵")
    assert "/models/a\\udcffb" in page.text


def test_negative_control_text_that_is_not_escaped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("html.escape", lambda text: text)
    found = faults(render_page(hostile_report(), HOSTILE))
    assert {"tag img", "src of img", "onerror of img"} <= set(found)
    assert any(re.fullmatch(r"\d+ scripts", fault) for fault in found)


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        ("<main>", '<main><a href="https://x.invalid">', "href of a"),
        ("<style>", "<style>@import 'x.css';", "style: @import 'x.css';"),
        ("<style>", "<style>p { background: url(x.png) }", "style: url(x.png)"),
        ('"use strict";', '"use strict"; fetch("x");', "script"),
        ("default-src 'none'", "default-src *", "policy: default-src *"),
    ],
)
def test_negative_control_what_is_fetched_is_found(good: str, bad: str, fault: str) -> None:
    html = render_page(make(), COMMAND)
    assert faults(html) == []
    first = html.index(get_plotlyjs()) + len(get_plotlyjs()) if good.startswith('"') else 0
    assert any(found.startswith(fault) for found in faults(html[:first] + html[first:].replace(good, bad, 1)))


def test_largest_page_is_small_enough(tmp_path: Path) -> None:
    lines = ("problem or note " * 90,) * 900
    report = replace(make(layers=64, columns=128), thresholds=FAILING, problems=lines, notes=lines)
    write_page(report, tmp_path / "page.html", command=COMMAND)
    nbytes = (tmp_path / "page.html").stat().st_size
    assert nbytes - len(get_plotlyjs().encode()) < MAX_NBYTES - 4_815_814
    assert nbytes <= MAX_NBYTES
    assert page_of(report).html.count("plotly.js v") == get_plotlyjs().count("plotly.js v")
    # Control: four times as many columns are too many.
    assert len(render_page(replace(report, heat=make(layers=64, columns=512).heat), COMMAND)) > MAX_NBYTES


def test_long_lists_are_cut_off_and_counted() -> None:
    page = page_of(replace(make(), problems=tuple(f"problem {n}" for n in range(1234))))
    assert "problem 39" in page.text and "problem 40" not in page.text
    assert "and 1,194 more" in page.text and page.headings[0] == "Failed: 1,234 problems"


def test_no_mtp_no_experts_one_sequence() -> None:
    report = make(mtp=False)
    layers = tuple(
        replace(layer, routes={}, router=None, rerouted=None, experts=()) for layer in report.layers
    )
    page = page_of(replace(report, layers=layers, num_sequences=1, notes=(), problems=("one",)))
    assert page.headings[0] == "Failed: 1 problem"
    assert not {"MTP layer 5", "Choice of experts", "Worst experts", "Notes"} & set(page.headings)
    assert "tokens.npy, 4 x 384; 384 in all" in page.text
    assert charts_of(page)["heat"]["layout"]["xaxis"]["title"]["text"] == "token"


def test_the_page_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    write_page(make(), path, command=COMMAND)
    assert path.read_text() == render_page(make(), COMMAND)
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match=r"page\.html: writing"):
        write_page(make(), tmp_path / "gone" / "page.html", command=COMMAND)
    (tmp_path / "page.html").mkdir()
    with pytest.raises(DestinationError, match=r"page\.html"):
        write_page(make(), tmp_path / "page.html", command=COMMAND)
    assert os.listdir(tmp_path) == ["page.html"]


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_plotly()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=re.escape("pip install 'dsv3-tools[report]'")):
        require_plotly()
