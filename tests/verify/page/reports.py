"""Invented reports of comparisons, and what a page of one says, read back by another parser."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dsv3_tools.verify.logits_results import (
    RUNS,
    Divergence,
    ExpertError,
    HeatMap,
    Histogram,
    LayerResult,
    LogitsReport,
    Thresholds,
    WorstToken,
)

SAME = Divergence(0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 6.5)
TAGS = (
    "html head meta title style body main noscript header section footer h1 h2 h3 p b ul li div span strong "
    "small dl dt dd code table thead tbody tr th td details summary script"
)


def make(*, layers: int = 6, columns: int = 12, noise: bool = True, mtp: bool = True) -> LogitsReport:
    """Returns a passing report without limits, all its figures different: one dense layer, the rest MoE."""
    random = np.random.default_rng(layers)
    runs = {name: _divergence(random) for name in RUNS if noise or not name.startswith("noise")}
    kinds = ["dense", *["moe"] * (layers - 1 - mtp), *["mtp"] * mtp]
    num_tokens = 128 * columns
    counts = {run: tuple(map(int, random.integers(1, 90, 20))) for run in runs}
    edges = tuple(map(float, np.logspace(-9, 1, 21)))
    values = random.lognormal(-5, 1, (layers, columns))
    return LogitsReport(
        reference=Path("/models/original"),
        candidate=Path("/models/converted"),
        tokens=f"tokens.npy, 4 x {num_tokens // 4}",
        num_sequences=4,
        length=num_tokens // 4,
        devices=("cuda:0 (H200)", "cuda:1 (H200)"),
        dtype="BF16",
        formats=(("fp8_block", "bf16"), ("int4_g128", "bf16")),
        perplexity=6.5,
        runs=runs,
        mtp=({run: _divergence(random) for run in runs},) * mtp,
        layers=tuple(_layer(random, number, kind, list(runs)) for number, kind in enumerate(kinds)),
        worst=tuple(_token(random, rank) for rank in range(20)),
        histogram=Histogram(edges, counts, {run: rank + 3 for rank, run in enumerate(runs)}),
        heat=HeatMap(
            tuple(range(layers)), tuple(range(0, num_tokens, 128)), tuple(map(tuple, values.tolist()))
        ),
        thresholds=Thresholds("none"),
        problems=(),
        notes=("the candidate has no chat template",),
        seconds=751.0,
        nbytes=1_234_000_000,
        embedding=0.00123,
        head=0.00456,
    )


def _divergence(random: np.random.Generator) -> Divergence:
    below, above = random.uniform(0.001, 0.9, 6).tolist(), random.uniform(0.9, 0.99, 3).tolist()
    return Divergence(*below[:4], *above[:2], *below[4:], above[2], 6.5 + below[0])


def _layer(random: np.random.Generator, number: int, kind: str, runs: list[str]) -> LayerResult:
    errors = random.lognormal(-5, 1, 13).tolist()
    experts = tuple(
        ExpertError(int(random.integers(256)), error, int(random.integers(1, 5000)))
        for error in sorted(errors[:5], reverse=True)
    )
    is_moe = kind != "dense"
    return LayerResult(
        number,
        kind,
        dict(zip(runs, errors[5:], strict=False)),
        {run: float(random.uniform(0.9, 1)) for run in runs if run.endswith("free")} if is_moe else {},
        errors[9],
        errors[10],
        errors[11] if kind == "mtp" else None,
        errors[12] if is_moe else None,
        errors[8] if is_moe else None,
        experts if is_moe else (),
    )


def _token(random: np.random.Generator, rank: int) -> WorstToken:
    context = f"context {rank} " + "of this and that " * 14
    return WorstToken(rank % 4, rank + 7, 3.0 - rank / 10, context, f"is{rank}", 0.875, f"was{rank}", 0.75)


def make_equal(*, noise: bool = True) -> LogitsReport:
    """Returns the report of a lossless conversion: the candidate has no difference at all."""
    report = make(noise=noise)
    zeros = dict.fromkeys(["replayed", "free"], 0.0)
    layers = tuple(
        replace(
            layer,
            hidden={**layer.hidden, **zeros},
            routes={run: 1.0 if run == "free" else share for run, share in layer.routes.items()},
            attention=0.0,
            mlp=0.0,
            join=layer.join and 0.0,
            router=layer.router and 0.0,
            rerouted=layer.rerouted and 0.0,
            experts=tuple(replace(expert, error=0.0) for expert in layer.experts),
        )
        for layer in report.layers
    )
    histogram = report.histogram
    same = dict.fromkeys(zeros, SAME)
    return replace(
        report,
        runs={**report.runs, **same},
        mtp=tuple({**runs, **same} for runs in report.mtp),
        layers=layers,
        worst=(),
        histogram=replace(
            histogram,
            counts={**histogram.counts, **dict.fromkeys(zeros, (0,) * 20)},
            num_zero={**histogram.num_zero, **dict.fromkeys(zeros, 1536)},
        ),
        heat=replace(report.heat, values=((0.0,) * 12,) * 6),
        embedding=0.0,
        head=0.0,
    )


@dataclass
class Page(HTMLParser):
    """A page as a browser reads it: tags with attributes, tables, texts, scripts.

    Attributes:
        html: the page.
        tags: all start tags with their attributes.
        tables: by the name for screen readers, rows of cells' texts.
        headings: texts of h1 to h3.
        scripts: their texts.
        text: all texts outside of scripts and styles.
    """

    html: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    headings: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    text: str = ""
    inside: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "div" and "aria-label" in dict(attrs):
            self.tables[str(dict(attrs)["aria-label"])] = []
        elif tag == "tr":
            [*self.tables.values()][-1].append([])
        elif tag in ("td", "th"):
            [*self.tables.values()][-1][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag in ("td", "th", "script", "style", "h1", "h2", "h3") else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            {"script": self.scripts, "style": self.styles}[self.inside].append(data)
            return
        self.text += data
        if self.inside in ("td", "th", "code", "small") and self.tables and [*self.tables.values()][-1]:
            [*self.tables.values()][-1][-1][-1] += data if self.inside != "small" else f" {data}"
        elif self.inside in ("h1", "h2", "h3"):
            self.headings[-1] += data

    @property
    def policy(self) -> str:
        """The content security policy."""
        found = [attrs for tag, attrs in self.tags if tag == "meta" and "http-equiv" in attrs]
        return str(found[0]["content"])


def faults(html: str) -> list[str]:
    """Returns what a page has that it must not: unknown tags, handlers, links, scripts that are not known."""
    page = Page(html)
    found = [f"tag {tag}" for tag, _ in page.tags if tag not in TAGS.split()]
    allowed = {"src", "href", "srcset", "action", "data", "style"}
    for tag, attrs in page.tags:
        found += [f"{name} of {tag}" for name in attrs if name.startswith("on") or name in allowed]
    found += [
        f"style: {text}" for style in page.styles for text in re.findall(r"url\(.*?\)|@import.*", style)
    ]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.scripts[1:]]
    found += [f"script {text[:9]}" for text in hashes if f"'sha256-{text}'" not in page.policy]
    if len(page.scripts) != 3 or page.policy.count("sha256-") != 2:
        found.append(f"{len(page.scripts)} scripts")
    if not page.policy.startswith("default-src 'none'; ") or re.search(r"https?:|\*|'self'", page.policy):
        found.append(f"policy: {page.policy}")
    return found
