"""The sections of a comparison's page: what was found, in the order in which a reader asks for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from dsv3_tools.verify.logits_results import RUNS, LogitsReport
from dsv3_tools.verify.page.figures import asked, figures, layers_table, limits, mtp_figures
from dsv3_tools.verify.page.text import (
    Markup,
    duration,
    element,
    figure,
    join,
    listed,
    rise,
    section,
    share,
    size,
    visible,
)
from dsv3_tools.verify.page.worst import badness, experts, tokens

__all__ = ["sections"]

_MAX_LINES = 40
_MAX_LINE = 400
_TIMES = "\N{MULTIPLICATION SIGN}"


def sections(report: LogitsReport, command: str, charts: Collection[str]) -> Iterator[Markup]:
    """Yields the sections.

    Args:
        report: what was found.
        command: that made the page.
        charts: names of the charts that there are; where there is none, all is equal.
    """
    yield _verdict(report)
    yield _compared(report, command)
    yield _figures(report)
    yield _heat(report, charts)
    yield _hidden(report, charts)
    yield _blocks(report, charts)
    if any(layer.rerouted is not None for layer in report.layers):
        yield _routes(report, charts)
    yield _divergences(report, charts)
    yield tokens(report)
    if any(layer.router is not None for layer in report.layers):
        yield experts(report)
    if report.notes:
        notes = listed(report.notes, most=_MAX_LINES, length=_MAX_LINE)
        yield section("Notes", "What differs between the two checkpoints and may.", notes)


def _verdict(report: LogitsReport) -> Markup:
    count = len(report.problems)
    title = "Passed" if report.passed else f"Failed: {count:,} problem{'s' if count > 1 else ''}"
    names = [element("b", visible(path.name, _MAX_LINE)) for path in (report.candidate, report.reference)]
    held_to = f", held to the limits of {report.thresholds.preset}" if asked(report.thresholds) else ""
    lead = join(names[0], " against ", names[1], f"{held_to}.{_lossless(report)}")
    problems = [] if report.passed else [listed(report.problems, most=_MAX_LINES, length=_MAX_LINE)]
    return element(
        "header",
        element("p", "dsv3 verify logits", class_="eyebrow"),
        element("h1", title, class_="passed" if report.passed else "failed"),
        element("p", lead, class_="lead"),
        *problems,
        element("div", *_tiles(report), class_="tiles"),
    )


def _lossless(report: LogitsReport) -> str:
    """Returns a sentence if there is no difference at all, otherwise nothing."""
    runs = [report.runs[run] for run in ("replayed", "free") if run in report.runs]
    equal = all(found.kl_max == 0 and found.max_logit_error == 0 for found in runs)
    return " Every logit of the candidate equals the reference's." if equal else ""


def _tiles(report: LogitsReport) -> Iterator[Markup]:
    """Yields the four figures that say most."""
    found, noise = report.runs["replayed"], report.runs.get("noise_replayed")
    beside = "mean, routes replayed; 0 is equal"
    if found.kl and noise is not None and noise.kl:
        beside = f"{figure(found.kl / noise.kl)} times the BF16 noise"
    yield _tile("KL divergence", f"{figure(found.kl)} nats" if found.kl else "0", beside)
    beside = f"BF16 noise: {share(noise.top1)}" if noise is not None else "of all positions"
    yield _tile("Top-1 agreement", share(found.top1), beside)
    before = report.perplexity
    change = found.perplexity / before - 1
    beside = (
        f"{rise(change)} on the reference's {figure(before, digits=4)}" if change else "the reference's, too"
    )
    yield _tile("Perplexity", figure(found.perplexity, digits=4), beside)
    error, place = max(_own_errors(report), key=lambda entry: badness(entry[0]))
    yield _tile("Largest own error of a block", figure(error), place if error else "every block is equal")


def _tile(name: str, value: str, beside: str) -> Markup:
    parts = element("span", name), element("strong", value), element("small", beside)
    return element("div", *parts, class_="tile")


def _own_errors(report: LogitsReport) -> Iterator[tuple[float, str]]:
    yield report.embedding, "embedding"
    yield report.head, "final norm and lm_head"
    for layer in report.layers:
        mlp = "MLP" if layer.kind == "dense" else "experts"
        for block, error in (("attention", layer.attention), (mlp, layer.mlp), ("input", layer.join)):
            if error is not None:
                yield error, f"layer {layer.number}, {block}"


def _compared(report: LogitsReport, command: str) -> Markup:
    num_tokens = report.num_sequences * report.length
    devices = [
        f"{count} {_TIMES} {name}" if count > 1 else name for name, count in Counter(report.devices).items()
    ]
    words = [element("span", visible(word, _MAX_LINE)) for word in command.split(" ")]
    entries = {
        "reference": _checkpoint(str(report.reference), report.formats[0]),
        "candidate": _checkpoint(str(report.candidate), report.formats[1]),
        "tokens": f"{report.tokens}; {num_tokens:,} in all",
        "arithmetic": f"{report.dtype}; weights are rounded to BF16 on both sides",
        "devices": ", ".join(devices),
        "limits": "; ".join(f"{limit.title} {limit}" for limit in asked(report.thresholds)) or "none",
        "work": f"{size(report.nbytes)} of weights read, in {duration(report.seconds)}",
        "command": element("code", Markup(" ".join(words)), class_="command"),
    }
    shown = [
        join(
            element("dt", name), element("dd", text if isinstance(text, Markup) else visible(text, _MAX_LINE))
        )
        for name, text in entries.items()
    ]
    return element("section", element("h2", "What was compared"), element("dl", *shown))


def _checkpoint(path: str, formats: Sequence[str]) -> Markup:
    names = element("span", visible(", ".join(formats), _MAX_LINE), class_="formats")
    return join(element("code", visible(path, _MAX_LINE, end=True)), names)


def _figures(report: LogitsReport) -> Markup:
    legend = [join(element("dt", run.replace("_", ", ")), element("dd", RUNS[run])) for run in report.runs]
    mtp = [join(element("h3", f"MTP layer {number}"), found) for number, found in mtp_figures(report)]
    lead = "How well the candidate's predictions agree with the reference's, over all positions."
    if "noise_replayed" in report.runs:
        lead += " Below the noise, which the type of arithmetic alone makes, differences mean nothing."
    return section("All tokens", lead, figures(report), element("dl", *legend, class_="legend"), *mtp)


def _chart(name: str, charts: Collection[str], title: str, equal: str) -> Markup:
    """Returns where the page's script draws a chart, or, if there is none, what is equal."""
    if name not in charts:
        return element("p", equal, class_="equal")
    return element("div", id=f"chart-{name}", class_="chart", role="img", aria_label=title)


def _heat(report: LogitsReport, charts: Collection[str]) -> Markup:
    extent = f"in all {len(report.heat.layers)} layers, in all {len(report.heat.starts)} stretches of tokens"
    return section(
        "Where errors arise",
        "Error of the hidden states after each layer, routes replayed, over stretches of neighbouring "
        "tokens: below a layer with damaged weights all is brighter; a bright column is text that suffers.",
        _chart(
            "heat",
            charts,
            "error by layer and token",
            f"Every hidden state is equal: the error is 0 {extent}.",
        ),
    )


def _hidden(report: LogitsReport, charts: Collection[str]) -> Markup:
    return section(
        "Hidden states",
        "The same error over all tokens, for each run: it should grow no faster than the noise; where it "
        "takes a step upwards is the layer to look at.",
        _chart(
            "hidden",
            charts,
            "error of hidden states by layer",
            f"All runs have equal hidden states after each of the {len(report.layers)} layers.",
        ),
    )


def _blocks(report: LogitsReport, charts: Collection[str]) -> Markup:
    return section(
        "Each layer by itself",
        "What a layer's own weights change, measured on the reference's hidden states, so that no layer pays "
        "for the one before: low and level is good, a peak is a block whose weights are off.",
        _chart(
            "blocks",
            charts,
            "own errors of blocks by layer",
            f"Every block is equal: on equal inputs, each of the {len(report.layers)} layers adds the same.",
        ),
        element("p", _ends(report), class_="fine"),
        element("details", element("summary", "Every layer in figures"), layers_table(report)),
    )


def _ends(report: LogitsReport) -> str:
    """Returns what the chart of layers has no place for."""
    limit = limits(report.thresholds)["max_block_error"]
    ends = (("embedding", report.embedding), ("final norm and lm_head", report.head))
    texts = [
        f"{name} {limit.show(error, figure)}{' ✗' if limit.is_missed(error) else ''}" for name, error in ends
    ]
    differences = {layer.router for layer in report.layers} - {None}
    routers = " Every router gives equal scores on equal inputs." if differences == {0.0} else ""
    return f"Outside the layers: {', '.join(texts)}.{routers}"


def _routes(report: LogitsReport, charts: Collection[str]) -> Markup:
    lead = (
        "Share of the chosen experts that the reference chose, too, when each side chooses for itself: near "
        "the noise is good."
    )
    if any(layer.rerouted for layer in report.layers):
        lead += " Below, tokens that a router sends elsewhere although its input is the same: 0 is good."
    return section(
        "Choice of experts",
        lead,
        _chart(
            "routes",
            charts,
            "agreement of routes by layer",
            "Every token is sent to the same experts in every layer.",
        ),
    )


def _divergences(report: LogitsReport, charts: Collection[str]) -> Markup:
    zeros = []
    for run, counts in report.histogram.counts.items():
        num_zero = report.histogram.num_zero[run]
        zeros.append(f"{run.replace('_', ', ')} {num_zero:,} of {num_zero + sum(counts):,}")
    return section(
        "Divergence by position",
        "How many positions are how far apart, on a logarithmic scale: further left is better; a second hump "
        "on the right is a group of tokens that the candidate predicts differently.",
        _chart("kl", charts, "histogram of KL divergences", "No position differs: every KL divergence is 0."),
        element("p", f"Exactly 0, thus in no bin: {'; '.join(zeros)}.", class_="fine"),
    )
