"""`dsv3 verify logits`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click

from dsv3_tools.checkpoint.source import Source, is_same_source
from dsv3_tools.cli.findings import finish, print_findings, verdict
from dsv3_tools.cli.options import debug_option, forward_options, json_option, source_argument
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line, print_note, print_table, size
from dsv3_tools.cli.progress import shown_progress
from dsv3_tools.cli.signals import stop_on_signals
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.errors import DestinationError, Dsv3Error, UsageError
from dsv3_tools.model.cores import WAIT_POLICY
from dsv3_tools.verify.logits import verify_logits
from dsv3_tools.verify.logits_limits import LIMITS, PRESETS
from dsv3_tools.verify.logits_results import LayerResult, LogitsReport
from dsv3_tools.verify.page.page import require_plotly, write_page

__all__ = ["logits"]

F = TypeVar("F", bound=Callable[..., Any])

_MAX_LAYERS = 12
_FILE = click.Path(dir_okay=False, path_type=Path)


def _limit_options(function: F) -> F:
    """Adds an option for every limit."""
    for name, line in reversed(LIMITS.items()):
        option = click.option(f"--{name.replace('_', '-')}", type=float, metavar="NUMBER", help=line)
        function = option(function)
    return click.option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        help="Limits by kind of conversion.  [default: by CANDIDATE's formats]",
    )(function)


@click.command("logits")
@source_argument("reference")
@source_argument("candidate")
@forward_options
@click.option(
    "--baseline/--no-baseline",
    default=True,
    show_default=True,
    help="Run REFERENCE in the other arithmetic, too: what rounding alone does.",
)
@_limit_options
@click.option("--report", type=_FILE, help="Write a page (HTML, opens offline) to this file.")
@json_option
@debug_option
@click.pass_context
def logits(
    ctx: click.Context,
    /,
    reference: Source,
    candidate: Source,
    *,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run both checkpoints over the same tokens and compare what they predict.

    Any formats, any size: one layer is in memory at a time, and every weight is read once. Besides the
    logits, every layer's own error is measured on REFERENCE's hidden states, so that a wrong expert, scale
    or router is named. Exit code 4 if a limit is missed; the limits go by the formats: what changes no
    weight must give the same logits, bit for bit.

    \b
    Example:
      dsv3 verify logits miniature/checkpoint /tmp/mini-W4A16 --report /tmp/report.html
      dsv3 verify logits miniature/checkpoint /tmp/mini-bf16 --max-tokens 1024
    """
    os.environ.setdefault(WAIT_POLICY, "passive")  # before torch is loaded
    if report is not None:
        require_plotly()
        _check_place(report, reference, candidate)
    is_first = Ranks.join().is_first
    with (
        stop_on_signals(resumes=False) as stop,
        shown_progress("verify logits", pieces="layers", quiet=not is_first) as update,
    ):
        found = verify_logits(reference, candidate, on_progress=update, stop=stop, **options)
    if not is_first:
        ctx.exit(0)
    page = "" if report is None else _write(found, report)
    if as_json:
        print_json(jsonable(found) | {"passed": found.passed})
    else:
        _print(found)
    if page:
        (print_note if as_json else print_line)(f"  {page}")
    finish(ctx, str(candidate), found.problems, as_json=as_json)


def _check_place(report: Path, *models: Source) -> None:
    """Refuses to write where the page cannot go, or should not: over a device, or into a checkpoint.

    Raises:
        UsageError: a place that is in use for something else.
        DestinationError: one that cannot be written.
    """
    place = report.resolve()
    if report.is_symlink() or (place.exists() and not place.is_file()):
        raise UsageError(f"--report {report}: expected a new or a regular file")
    if any(is_same_source(place.parent, model) for model in models):
        raise UsageError(f"--report {report}: is in a checkpoint's folder; choose another one")
    if not os.access(place.parent, os.W_OK):
        raise DestinationError(f"--report {report}: its folder is not there, or not writable")


def _write(found: LogitsReport, path: Path) -> str:
    """Returns a line that says where the page is, or why it isn't: the figures are not lost for that."""
    try:
        write_page(found, path, command=shlex.join(["dsv3", *sys.argv[1:]]))
    except Dsv3Error as error:
        return f"report: not written: {error}"
    return f"report: {path}"


def _print(found: LogitsReport) -> None:
    where = found.devices[0] if len(found.devices) == 1 else f"{len(found.devices)} devices"
    print_line(
        f"{verdict(found.problems)}: {found.candidate} against {found.reference}: {found.tokens} tokens, "
        f"{found.dtype} on {where}, {size(found.nbytes)} of layers, {found.seconds:.1f} s"
    )
    print_table(_figures(found))
    print_line(f"  reference's perplexity: {found.perplexity:.4f}; limits: preset {found.thresholds.preset}")
    layers = found.layers
    if len(layers) > _MAX_LAYERS:
        layers = tuple(sorted(layers, key=lambda layer: -max(layer.attention, layer.mlp))[:_MAX_LAYERS])
        print_line(f"  layers with the largest errors of their own, {_MAX_LAYERS} of {len(found.layers)}:")
    print_table([_LAYER_HEADS, *map(_layer_row, layers)])
    print_findings(found.problems, found.notes)


_COLUMNS = {
    "replayed": "replayed",
    "free": "free",
    "noise_replayed": "noise replayed",
    "noise_free": "noise free",
}
_LAYER_HEADS = (
    "layer",
    "kind",
    "error replayed",
    "free",
    "same experts",
    "own error: attention",
    "MLP",
    "router",
    "worst expert",
)


def _figures(found: LogitsReport) -> list[tuple[str, ...]]:
    """Returns a row for each figure, a column for each run, and the limit."""
    limits, runs = found.thresholds, found.runs
    rows: list[tuple[str, str, str, float | None]] = [
        ("KL(reference || run), nats", "kl", ".3g", limits.max_kl),
        ("KL(run || reference)", "kl_reverse", ".3g", None),
        ("KL, 99th percentile", "kl_p99", ".3g", None),
        ("top-1 agreement", "top1", ".2%", limits.min_top1),
        ("top-5 agreement", "top5", ".2%", limits.min_top5),
        ("mean |logit difference|", "logit_error", ".3g", None),
        ("largest |logit difference|", "max_logit_error", ".3g", limits.max_logit_error),
        ("cosine of logits", "cosine", ".6f", None),
        ("perplexity", "perplexity", ".4f", None),
    ]
    table = [("", *(_COLUMNS[run] for run in runs), "limit")]
    for line, name, style, limit in rows:
        cells = (format(getattr(divergence, name), style) for divergence in runs.values())
        table.append((line, *cells, "" if limit is None else format(limit, style)))
    for number, mtp in enumerate(found.mtp):
        cells = (format(divergence.kl, ".3g") for divergence in mtp.values())
        table.append((f"MTP {number + 1}: KL", *cells, ""))
    return table


def _layer_row(layer: LayerResult) -> tuple[str, ...]:
    worst = layer.experts[0] if layer.experts else None
    return (
        str(layer.number),
        layer.kind,
        f"{layer.hidden['replayed']:.3g}",
        f"{layer.hidden['free']:.3g}",
        f"{layer.routes['free']:.2%}" if layer.routes else "",
        f"{layer.attention:.3g}",
        f"{layer.mlp:.3g}",
        "" if layer.router is None else f"{layer.router:.3g}",
        "" if worst is None else f"{worst.number}: {worst.error:.3g}",
    )
