"""The sections of a comparison's page that name the worst: tokens and experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsv3_tools.verify.logits_results import LayerResult, LogitsReport, WorstToken
from dsv3_tools.verify.page.figures import Limit, limits
from dsv3_tools.verify.page.text import Markup, element, figure, join, section, share, table, visible

__all__ = ["badness", "experts", "tokens"]

_MAX_CONTEXT = 240
_MAX_TOKEN = 60
_MAX_TOKENS_SHOWN = 40
_MAX_EXPERTS_SHOWN = 10
_MAX_EXPERTS_PER_LAYER = 3


def badness(error: float) -> float:
    """Returns an error to sort by; what is not a number is worse than any."""
    return math.inf if math.isnan(error) else error


def tokens(report: LogitsReport) -> Markup:
    """Returns the positions that are furthest apart, and what was predicted there."""
    title = "Worst tokens"
    lead = (
        "The positions that are furthest apart, routes replayed, and the most likely next token of each side."
    )
    worst = [token for token in report.worst if token.kl != 0]
    if not worst:
        return section(title, lead, element("p", "No position differs.", class_="equal"))
    rows = [_token_cells(token) for token in worst[:_MAX_TOKENS_SHOWN]]
    head = ["KL", "place", "context", "reference", "candidate"]
    return section(title, lead, table([head], rows, title="worst tokens", kind="tokens"))


def _token_cells(token: WorstToken) -> list[str]:
    context = element("code", visible(token.context, _MAX_CONTEXT, end=True))
    return [
        figure(token.kl),
        join(f"sequence {token.sequence:,}", element("small", f"token {token.position:,}")),
        element("td", context, class_="context"),
        _prediction(token.reference, token.reference_probability),
        _prediction(token.candidate, token.candidate_probability),
    ]


def _prediction(text: str, probability: float) -> Markup:
    shown = visible(text, _MAX_TOKEN).replace(" ", "␣")
    return join(element("code", shown, class_="token"), element("small", share(probability)))


def experts(report: LogitsReport) -> Markup:
    """Returns the routed experts with the largest errors: of all layers, and of each."""
    title = "Worst experts"
    lead = (
        "Routed experts whose output differs most on equal inputs, relative to it: one far above the others "
        "has weights that went wrong."
    )
    found = [(layer, expert) for layer in report.layers for expert in layer.experts]
    if not any(expert.error for _, expert in found):
        return section(title, lead, element("p", "No routed expert differs.", class_="equal"))
    found.sort(key=lambda entry: badness(entry[1].error), reverse=True)
    limit = limits(report.thresholds)["max_expert_error"]
    rows = [
        [
            f"layer {layer.number}, expert {expert.number}",
            _error(expert.error, limit),
            f"{expert.num_tokens:,}",
        ]
        for layer, expert in found[:_MAX_EXPERTS_SHOWN]
    ]
    head = ["expert", "error" if limit.value is None else f"error, limit {limit}", "tokens"]
    return section(
        title,
        lead,
        table([head], rows, title="worst experts", kind="experts"),
        element("details", element("summary", "The worst of every layer"), _by_layer(report.layers, limit)),
    )


def _error(error: float, limit: Limit) -> Markup:
    text = limit.show(error, figure)
    return element("td", f"✗ {text}", class_="missed") if limit.is_missed(error) else element("td", text)


def _by_layer(layers: Sequence[LayerResult], limit: Limit) -> Markup:
    listing = [layer for layer in layers if layer.experts]
    most = min(_MAX_EXPERTS_PER_LAYER, max(len(layer.experts) for layer in listing))
    rows = []
    for layer in listing:
        cells = []
        for expert in layer.experts[:most]:
            which = element("small", f"expert {expert.number}, {expert.num_tokens:,} tokens")
            cells += [join(f"{'✗ ' if limit.is_missed(expert.error) else ''}{figure(expert.error)}", which)]
        rows.append([str(layer.number), *cells, *[""] * (most - len(cells))])
    head = ["layer", *(f"{rank}." for rank in range(1, most + 1))]
    return table([head], rows, title="worst experts of every layer", kind="experts")
