"""The tables of figures on a comparison's page, each with a sentence on what it is, and the limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsv3_tools.verify.logits_results import RUNS, Divergence, LayerResult, LogitsReport, Thresholds
from dsv3_tools.verify.page.text import (
    Markup,
    element,
    figure,
    join,
    label,
    percent_label,
    rise,
    share,
    table,
)

__all__ = ["KL", "Limit", "asked", "figures", "layers_table", "limits", "mtp_figures"]

Write = Callable[[float, int], str]
"""Writes a value with so many extra digits."""

KL = "KL(reference\N{NO-BREAK SPACE}‖\N{NO-BREAK SPACE}run)"

_MOST_DIGITS = 12


@dataclass(frozen=True)
class Limit:
    """One of the `Thresholds`.

    Attributes:
        name: its field.
        title: what to call it.
        write: writes its value.
        figure: the figure of all tokens that it is of; empty if it is of layers.
        run: the run whose figure it is of.
        value: what was asked for; None for nothing.
    """

    name: str
    title: str
    write: Callable[[float], str] = label
    figure: str = ""
    run: str = "replayed"
    value: float | None = None

    def __str__(self) -> str:
        """Returns it with its sign: ≤ 0.01."""
        assert self.value is not None
        return f"{'≥' if self.name.startswith('min_') else '≤'} {self.write(self.value)}"

    def is_missed(self, found: float) -> bool:
        """Whether a value is on the wrong side; NaN is on no right one."""
        if self.value is None:
            return False
        return not (found >= self.value if self.name.startswith("min_") else found <= self.value)

    def show(self, found: float, write: Write) -> str:
        """Returns a value with as many digits as tell it from the limit."""
        if self.value is None or found == self.value:
            return write(found, 0)
        texts = ((write(found, extra), write(self.value, extra)) for extra in range(_MOST_DIGITS))
        return next((text for text, limit in texts if text != limit), write(found, 0))


def _plus_percent(value: float) -> str:
    return f"+{percent_label(value)}" if value else "0 %"


_LIMITS = (
    Limit("max_kl", "mean KL", label, "kl"),
    Limit("min_top1", "top-1 agreement", percent_label, "top1"),
    Limit("min_top5", "top-5 agreement", percent_label, "top5"),
    Limit("max_logit_error", "max |logit difference|", label, "max_logit_error"),
    Limit("max_free_kl", "mean KL, free", label, "kl", "free"),
    Limit("max_perplexity_rise", "perplexity rise", _plus_percent, "rise"),
    Limit("max_block_error", "own error of a block"),
    Limit("max_expert_error", "own error of an expert"),
    Limit("max_router_error", "difference of a router's scores"),
)


def limits(thresholds: Thresholds) -> dict[str, Limit]:
    """Returns the thresholds by field, with their values."""
    return {limit.name: replace(limit, value=getattr(thresholds, limit.name)) for limit in _LIMITS}


def asked(thresholds: Thresholds) -> list[Limit]:
    """Returns the thresholds that were asked for."""
    return [limit for limit in limits(thresholds).values() if limit.value is not None]


def _seven(value: float, extra: int) -> str:
    return "1" if abs(value - 1) < 1e-12 else figure(value, extra, digits=7)


def _five(value: float, extra: int) -> str:
    return figure(value, extra, digits=5)


@dataclass(frozen=True)
class _Row:
    """A row of the table: which figure, what to call it, how to write it, what it means and what is good."""

    field: str
    name: str
    write: Write
    meaning: str


_ROWS = (
    _Row("kl", "KL divergence", figure, f"mean {KL} in nats: how far predictions are apart; 0 is equal"),
    _Row("kl_reverse", "reverse KL", figure, "the other way round, KL(run ‖ reference); 0 is equal"),
    _Row("kl_p99", "KL, 99th percentile", figure, "one position in a hundred is further apart"),
    _Row("kl_max", "KL, maximum", figure, "the position that is furthest apart"),
    _Row("top1", "top-1 agreement", share, "positions with the same most likely token; more is better"),
    _Row("top5", "top-5 agreement", share, "same tokens among the five most likely; more is better"),
    _Row("logit_error", "mean |logit difference|", figure, "over all positions and tokens; 0 is equal"),
    _Row("max_logit_error", "max |logit difference|", figure, "the logit that is furthest off"),
    _Row("cosine", "cosine similarity of logits", _seven, "mean over positions; 1 is the same direction"),
    _Row("perplexity", "perplexity", _five, "how surprised it is by these tokens; lower is better"),
)


def figures(report: LogitsReport) -> Markup:
    """Returns the table of all tokens' figures: a row for each, a column for each run, limits beside them."""
    bounds = asked(report.thresholds)
    rows = [_cells(row, _values(row, report.runs), bounds) for row in _ROWS]
    meaning = f"against the reference's perplexity of {_five(report.perplexity, 0)}; near 0 is good"
    rises = {run: found.perplexity / report.perplexity - 1 for run, found in report.runs.items()}
    rows.append(_cells(_Row("rise", "perplexity rise", rise, meaning), rises, bounds))
    return table(_heads(report.runs, bounds), rows, title="figures of all tokens", kind="figures")


def mtp_figures(report: LogitsReport) -> Iterator[tuple[int, Markup]]:
    """Yields the number of each MTP layer, and the table of its figures."""
    numbers = [layer.number for layer in report.layers if layer.kind == "mtp"]
    for number, runs in zip(numbers, report.mtp, strict=True):
        rows = [_cells(replace(row, meaning=""), _values(row, runs), []) for row in _ROWS]
        yield number, table(_heads(runs, []), rows, title=f"figures of MTP layer {number}", kind="figures")


def _values(row: _Row, runs: Mapping[str, Divergence]) -> dict[str, float]:
    return {run: getattr(found, row.field) for run, found in runs.items()}


def _heads(runs: Mapping[str, Divergence], bounds: Sequence[Limit]) -> list[list[str]]:
    """Returns the two rows of the head: whose runs, and which."""
    top: list[str] = [Markup('<th rowspan="2"></th>')]
    below: list[str] = []
    sides = {"candidate": ("replayed", "free"), "BF16 noise (baseline)": ("noise_replayed", "noise_free")}
    for side, names in sides.items():
        before = len(below)
        for run in (run for run in names if run in runs):
            below.append(element("th", run.removeprefix("noise_"), scope="col", title=RUNS[run]))
            if any(limit.run == run for limit in bounds):
                below.append(element("th", "limit", scope="col", class_="limit"))
        if len(below) > before:
            top.append(_span(side, len(below) - before))
    return [top, below]


def _span(title: str, columns: int) -> Markup:
    return element("th", title, colspan=str(columns), scope="colgroup", class_="side")


def _cells(row: _Row, values: Mapping[str, float], bounds: Sequence[Limit]) -> list[str]:
    cells: list[str] = [join(row.name, element("small", row.meaning))]
    for run in (run for run in RUNS if run in values):
        of_run = [limit for limit in bounds if limit.run == run]
        limit = next((limit for limit in of_run if limit.figure == row.field), None)
        if limit is None:
            cells.append(row.write(values[run], 0))
            cells += [""] if of_run else []
            continue
        missed = limit.is_missed(values[run])
        kind = " missed" if missed else ""
        cells.append(element("td", limit.show(values[run], row.write), class_=f"value{kind}"))
        cells.append(element("td", f"{limit} {'✗' if missed else '✓'}", class_=f"limit{kind}"))
    return cells


def layers_table(report: LogitsReport) -> Markup:
    """Returns the figures of every layer: what the charts show, to read and to copy."""
    runs = [run for run in RUNS if run in report.runs]
    choosing = [run for run in runs if any(run in layer.routes for layer in report.layers)]
    groups = {
        "error of hidden states": [_short(run) for run in runs],
        "own errors": ["attention", "MLP or experts", "MTP input", "router"],
        "same experts": [_short(run) for run in choosing],
        "": ["rerouted"],
    }
    top: list[str] = [Markup('<th rowspan="2" scope="col">layer</th>')]
    top += [_span(title, len(below)) for title, below in groups.items() if below]
    bounds = limits(report.thresholds)
    rows = [_layer_cells(layer, runs, choosing, bounds) for layer in report.layers]
    head = [top, [name for below in groups.values() for name in below]]
    return table(head, rows, title="figures of every layer", kind="layers")


def _short(run: str) -> str:
    return run.replace("_", ", ")


def _layer_cells(
    layer: LayerResult, runs: Sequence[str], choosing: Sequence[str], bounds: Mapping[str, Limit]
) -> list[str]:
    block, router = bounds["max_block_error"], bounds["max_router_error"]
    kind = {"moe": "MoE", "mtp": "MTP"}.get(layer.kind, layer.kind)
    return [
        join(f"{layer.number} ", element("small", kind)),
        *(_error(layer.hidden.get(run)) for run in runs),
        *(_error(error, block) for error in (layer.attention, layer.mlp, layer.join)),
        _error(layer.router, router),
        *(_share(layer.routes.get(run)) for run in choosing),
        _share(layer.rerouted),
    ]


def _error(value: float | None, limit: Limit | None = None) -> str:
    """Returns 1.23e-3, with the same digits throughout a column; what misses its limit is marked."""
    if value is None:
        return ""
    text = f"{value:.2e}".replace("e-0", "e-") if value and math.isfinite(value) else figure(value)
    if limit is not None and limit.is_missed(value):
        return element("td", f"✗ {text}", class_="missed")
    return text


def _share(value: float | None) -> str:
    return "" if value is None else share(value)
