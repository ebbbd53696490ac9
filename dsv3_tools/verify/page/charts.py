"""The charts of a comparison's page, as plotly.js takes them; what is equal throughout has no chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dsv3_tools.verify.logits_results import LayerResult, LogitsReport
from dsv3_tools.verify.page.chart_parts import (
    LogAxis,
    Style,
    chart_layout,
    limit_line,
    plain_axis,
    rounded,
    series,
)
from dsv3_tools.verify.page.figures import KL

__all__ = ["RUN_NAMES", "Chart", "draw"]

Chart = dict[str, Any]

RUN_NAMES = {
    "replayed": "candidate, replayed",
    "free": "candidate, free",
    "noise_replayed": "BF16 noise, replayed",
    "noise_free": "BF16 noise, free",
}
"""What the legends of charts call the runs."""

# Readable on white and on black; dash and symbol tell them apart where colour does not.
_RUN_STYLES = {
    "replayed": Style("#2a7fc1", "solid", "circle"),
    "free": Style("#d9730d", "solid", "square"),
    "noise_replayed": Style("#7a8794", "dash", "circle-open"),
    "noise_free": Style("#7a8794", "dot", "square-open"),
}
_BLOCK_STYLES = {
    "attention": Style("#12968a", "solid", "circle"),
    "MLP or experts": Style("#b8478f", "solid", "square"),
    "input of the MTP layer": Style("#8d8a2c", "solid", "diamond"),
}
_ROUTER_STYLE = Style("#6c6fd0", "solid", "triangle-up")
_ZERO_COLOUR = "#aab4be"
_NOT_FINITE_COLOUR = "#e0408a"
_FEW_LAYERS = 12
_PERCENT = {"ticksuffix": " %", "tickformat": ".5~g"}


def draw(report: LogitsReport) -> dict[str, Chart]:
    """Returns the charts that have something to show, out of "heat", "hidden", "blocks", "routes", "kl"."""
    made = {
        "heat": _heat(report),
        "hidden": _hidden(report),
        "blocks": _blocks(report),
        "routes": _routes(report),
        "kl": _kl(report),
    }
    return {name: chart for name, chart in made.items() if chart is not None}


def _heat(report: LogitsReport) -> Chart | None:
    """Layers by stretches of tokens; the page's script takes the logarithms."""
    heat = report.heat
    values = [value for row in heat.values for value in row]
    if not any(values):
        return None
    cells = {
        "type": "heatmap",
        "x": [*heat.starts, report.num_sequences * report.length],
        "y": list(heat.layers),
    }
    data = [cells | _scale(LogAxis.of(values))]
    data[0]["customdata"] = [[rounded(value, 2) for value in row] for row in heat.values]
    if 0 in values:
        data.append(cells | _flat("zero", "equal (0)", _ZERO_COLOUR))
    if not all(map(math.isfinite, values)):
        data.append(cells | _flat("notFinite", "not finite", _NOT_FINITE_COLOUR))
    layout = chart_layout(min(660, max(240, 110 + 9 * len(heat.layers))))
    layers = [layer for layer in report.layers if layer.number in heat.layers]
    layout |= {"hovermode": "closest", "xaxis": _tokens_axis(report), "yaxis": _layers_axis(layers)}
    layout["yaxis"]["autorange"] = "reversed"
    layout["margin"]["t"] = 34 if len(data) > 1 else 8
    return {"data": data, "layout": layout}


def _scale(axis: LogAxis) -> dict[str, Any]:
    """Colours of a heat map that is given its values as `customdata`."""
    return {
        "hovertemplate": "layer %{y}, near token %{x:,d}<br>error %{customdata:.3~g}<extra></extra>",
        "colorscale": "Viridis",
        "zmin": round(axis.low, 4),
        "zmax": round(axis.high, 4),
        "colorbar": {
            "tickvals": [round(math.log10(tick), 4) for tick in axis.ticks],
            "ticktext": axis.tick_texts,
            "title": {"text": "relative error", "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
        },
    }


def _flat(kind: str, name: str, colour: str) -> dict[str, Any]:
    """One colour for the cells that have no logarithm; the script finds those of this kind."""
    return {
        "meta": kind,
        "name": name,
        "showlegend": True,
        "showscale": False,
        "colorscale": [[0, colour], [1, colour]],
        "hovertemplate": f"layer %{{y}}, near token %{{x:,d}}<br>{name}<extra></extra>",
    }


def _tokens_axis(report: LogitsReport) -> dict[str, Any]:
    """An axis of tokens, with ticks where sequences begin."""
    if report.num_sequences == 1:
        return plain_axis("token") | {"tickformat": ",d", "showgrid": False}
    every = math.ceil(report.num_sequences / 8) * report.length
    title = f"token, counted through {report.num_sequences:,} sequences of {report.length:,}"
    return plain_axis(title) | {"tick0": 0, "dtick": every, "tickformat": ",d", "showgrid": False}


def _layers_axis(layers: Sequence[LayerResult]) -> dict[str, Any]:
    """An axis of layer numbers; its title says which are MTP layers."""
    mtp = ", ".join(str(layer.number) for layer in layers if layer.kind == "mtp")
    title = f"layer ({mtp}: MTP)" if mtp else "layer"
    spike = {"spikecolor": "#8b97a2", "spikethickness": 1, "spikedash": "dot"}
    hover = {"unifiedhovertitle": {"text": "layer %{x}"}}
    ticks = {"tickformat": "d", "dtick": 1} if len(layers) <= _FEW_LAYERS else {"tickformat": "d"}
    return plain_axis(title) | {"showgrid": False} | ticks | spike | hover


def _hidden(report: LogitsReport) -> Chart | None:
    """Errors of hidden states by layer, a line for each run."""
    lines = {run: [layer.hidden.get(run) for layer in report.layers] for run in report.runs}
    if not any(map(any, lines.values())):
        return None
    axis = LogAxis.of(value for line in lines.values() for value in line)
    numbers = [layer.number for layer in report.layers]
    data = [series(RUN_NAMES[run], _RUN_STYLES[run], numbers, line, axis) for run, line in lines.items()]
    layout = chart_layout(340)
    layout |= {"xaxis": _layers_axis(report.layers), "yaxis": axis.axis("relative error")}
    return {"data": data, "layout": layout}


def _blocks(report: LogitsReport) -> Chart | None:
    """Own errors of blocks above, differences of routers' scores below where there are any."""
    lines: dict[str, list[float | None]] = {
        "attention": [layer.attention for layer in report.layers],
        "MLP or experts": [layer.mlp for layer in report.layers],
        "input of the MTP layer": [layer.join for layer in report.layers],
    }
    router = [layer.router for layer in report.layers]
    if not any(map(any, lines.values())) and not any(router):
        return None
    numbers, limit = [layer.number for layer in report.layers], report.thresholds.max_block_error
    axis = LogAxis.of([limit or None, *(value for line in lines.values() for value in line)])
    known = {name: line for name, line in lines.items() if set(line) != {None}}
    data = [series(name, _BLOCK_STYLES[name], numbers, line, axis) for name, line in known.items()]
    layout = chart_layout(340)
    layout |= {"xaxis": _layers_axis(report.layers), "yaxis": axis.axis("relative error")}
    layout["shapes"] = limit_line(limit, axis, "y")
    chart = {"data": data, "layout": layout}
    if any(router):
        _add_router(chart, numbers, router, report.thresholds.max_router_error)
    return chart


def _add_router(
    chart: Chart, numbers: Sequence[int], router: Sequence[float | None], limit: float | None
) -> None:
    """Puts the routers' line below the others."""
    axis = LogAxis.of([limit or None, *router])
    chart["data"].append(series("router", _ROUTER_STYLE, numbers, router, axis) | {"yaxis": "y2"})
    layout = chart["layout"]
    _split(layout, axis.axis("difference of scores"))
    layout["shapes"] += limit_line(limit, axis, "y2")


def _routes(report: LogitsReport) -> Chart | None:
    """Shares of equal choices; below, where there are any, of tokens sent elsewhere on equal inputs."""
    layers = [layer for layer in report.layers if layer.rerouted is not None]
    choosing = [run for run in report.runs if any(run in layer.routes for layer in layers)]
    lines = {run: [layer.routes.get(run) for layer in layers] for run in choosing}
    rerouted = [layer.rerouted for layer in layers]
    if not any(rerouted) and all(value == 1 for line in lines.values() for value in line):
        return None
    numbers = [layer.number for layer in layers]
    data = [series(RUN_NAMES[run], _RUN_STYLES[run], numbers, line, None) for run, line in lines.items()]
    layout = chart_layout(340)
    layout |= {"xaxis": _layers_axis(layers), "yaxis": plain_axis("same experts") | _PERCENT}
    if any(rerouted):
        below = series("rerouted on equal inputs", _ROUTER_STYLE, numbers, rerouted, None)
        data.append(below | {"yaxis": "y2"})
        axis = plain_axis("rerouted") | _PERCENT | {"rangemode": "tozero"}
        _split(layout, axis)
    return {"data": data, "layout": layout}


def _split(layout: dict[str, Any], axis: dict[str, Any]) -> None:
    """Makes a chart taller, for lines below the others, on an axis of their own."""
    layout["height"] += 140
    layout["xaxis"]["anchor"] = "y2"
    layout["yaxis"]["domain"] = [0.4, 1]
    layout["yaxis2"] = axis | {"domain": [0, 0.3]}


def _kl(report: LogitsReport) -> Chart | None:
    """Positions by their divergence, a stepped line for each run, over the bins that have something."""
    edges, counts = report.histogram.edges, report.histogram.counts
    filled = [bin_ for bin_ in range(len(edges) - 1) if any(count[bin_] for count in counts.values())]
    if not filled:
        return None
    bins = slice(max(0, filled[0] - 1), filled[-1] + 2)
    centres = [rounded(math.sqrt(low * high)) for low, high in pairwise(edges)][bins]
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": RUN_NAMES[run],
            "x": centres,
            "y": list(count[bins]),
            "line": _RUN_STYLES[run].line | {"shape": "hvh"},
            "hovertemplate": "%{y:,d}",
        }
        for run, count in counts.items()
        if any(count)
    ]
    layout = chart_layout(320)
    layout["xaxis"] = LogAxis.of(centres).axis(f"{KL} of a position, nats")
    layout["xaxis"] |= {"hoverformat": ".2~g", "showgrid": False}
    layout["yaxis"] = plain_axis("positions") | {"tickformat": ",d", "rangemode": "tozero"}
    return {"data": data, "layout": layout}
