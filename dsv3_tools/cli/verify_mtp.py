"""`dsv3 verify mtp`."""

from __future__ import annotations

import os
from typing import Any

import rich_click as click

from dsv3_tools.checkpoint.source import Source
from dsv3_tools.cli.findings import finish, print_findings, verdict
from dsv3_tools.cli.options import SOURCE, debug_option, forward_options, json_option, source_argument
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line, print_table
from dsv3_tools.cli.progress import shown_progress
from dsv3_tools.cli.signals import stop_on_signals
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.model.cores import WAIT_POLICY
from dsv3_tools.verify.mtp import MIN_ACCEPTANCE, MtpReport, verify_mtp

__all__ = ["mtp"]


@click.command("mtp")
@source_argument("source")
@click.option(
    "--mtp",
    type=SOURCE,
    help="Directory with the MTP module.  [default: SOURCE]",
)
@click.option(
    "--drafts",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Tokens drafted after each position.",
)
@click.option(
    "--min-acceptance",
    type=float,
    default=MIN_ACCEPTANCE,
    show_default=True,
    metavar="NUMBER",
    help="Least acceptance of the first draft.",
)
@forward_options
@json_option
@debug_option
@click.pass_context
def mtp(ctx: click.Context, /, source: Source, *, as_json: bool, **options: Any) -> None:
    """Measure how often the drafts of the MTP module would be accepted.

    Both the model and its module run over given tokens. A draft is accepted if it is what the main model
    predicts in its next step, as in greedy speculative decoding. A module of another model, or one with wrong
    weights, loads without an error and drafts nothing that is ever accepted: exit code 4.

    \b
    Example:
      dsv3 verify mtp miniature/checkpoint
      dsv3 verify mtp miniature/checkpoint --max-tokens 1024 --drafts 1
    """
    os.environ.setdefault(WAIT_POLICY, "passive")  # before torch is loaded
    is_first = Ranks.join().is_first
    with (
        stop_on_signals(resumes=False) as stop,
        shown_progress("verify mtp", pieces="layers", quiet=not is_first) as update,
    ):
        report = verify_mtp(source, on_progress=update, stop=stop, **options)
    if not is_first:
        ctx.exit(0)
    if as_json:
        print_json(jsonable(report) | {"passed": report.passed})
    else:
        _print(report)
    finish(ctx, str(report.module), report.problems, as_json=as_json)


def _print(report: MtpReport) -> None:
    where = report.devices[0] if len(report.devices) == 1 else f"{len(report.devices)} devices"
    print_line(
        f"{verdict(report.problems)}: {report.module}: {report.tokens} tokens, {report.dtype} on {where}, "
        f"{report.seconds:.1f} s"
    )
    heads = ("draft", "MTP layer", "accepted", "with all before", "tokens a step", "true token", "loss")
    rows = [
        (
            str(draft.number),
            f"{draft.layer}{' again' if draft.is_repeated else ''}",
            f"{draft.acceptance:.2%}",
            f"{draft.joint_acceptance:.2%}",
            f"{expected:.3f}",
            f"{draft.accuracy:.2%}",
            f"{draft.loss:.4f}",
        )
        for draft, expected in zip(report.drafts, report.expected_tokens, strict=True)
    ]
    print_table([heads, *rows])
    print_line(
        f"  main model: true token {report.accuracy:.2%}, loss {report.loss:.4f}; always drafting its most "
        f"frequent token: {report.chance:.2%} accepted"
    )
    print_findings(report.problems, ())
