"""`dsv3 check`."""

from __future__ import annotations

import rich_click as click

from dsv3_tools.checkpoint.source import Source
from dsv3_tools.cli.options import debug_option, json_option, source_argument
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line, print_note, print_table
from dsv3_tools.engines import ENGINES, Verdict
from dsv3_tools.errors import VerificationFailed
from dsv3_tools.verify.check import CheckReport
from dsv3_tools.verify.check import check as check_checkpoint

__all__ = ["check"]

_WIDTH = 120


@click.command("check")
@source_argument("directory")
@click.option("--engine", type=click.Choice(list(ENGINES)), help="The engine.  [default: a table of all]")
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tensor-parallel ranks that would share the weights.",
)
@json_option
@debug_option
@click.pass_context
def check(ctx: click.Context, directory: Source, *, engine: str | None, tp: int, as_json: bool) -> None:
    """Say what a serving engine would refuse or misread, from config.json, index and headers.

    No engine is run: the rules were read in its source, or tried on toy checkpoints, at the version that
    is printed; docs/engines.md has them. Exit code 4 if the named engine would not load the checkpoint.

    \b
    Example:
      dsv3 check miniature/checkpoint --engine vllm
      dsv3 check miniature/checkpoint
    """
    report = check_checkpoint(directory, engine=engine, tp=tp)
    if as_json:
        print_json(jsonable(report) | {"passed": report.passed, "problems": list(report.problems)})
    elif engine is None:
        _print_table(report)
    else:
        _print_verdict(report.verdicts[engine])
    if report.passed:
        return
    count = len(report.problems)
    more = "" if count == 1 else f"{count} problems, the first: "
    message = f"{directory}: {engine} would not load it: {more}{report.problems[0]}"
    if as_json:  # the one document is out; an exception would print another
        print_note(f"dsv3: {message}")
        ctx.exit(VerificationFailed.exit_code)
    raise VerificationFailed(message)


def _summary(verdict: Verdict) -> str:
    """Returns the verdict in a word or two."""
    if verdict.loads:
        return "loads"
    refused = any(problem.severity == "refused" for problem in verdict.problems)
    return "would not load" if refused else "would be misread"


def _print_verdict(verdict: Verdict) -> None:
    print_line(f"{verdict.engine}: {_summary(verdict)} (rules for {verdict.version})")
    for problem in verdict.problems:
        print_line(f"  {problem.severity}: {problem.message}")
        print_line(f"    {problem.rule}, from {problem.source}")


def _print_table(report: CheckReport) -> None:
    print_line(f"{report.directory}, tensor-parallel ranks: {report.tp}")
    rows = []
    for verdict in report.verdicts.values():
        first = verdict.problems[0].message if verdict.problems else ""
        shown = first if len(first) <= _WIDTH else first[: _WIDTH - 3] + "..."
        rows.append((verdict.engine, _summary(verdict), shown))
    print_table(rows)
    print_line("  for all findings of one: --engine NAME")
