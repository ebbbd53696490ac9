"""`dsv3 verify`."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from dsv3_tools.cli.options import debug_option, directory_argument, json_option
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line, print_note, size
from dsv3_tools.cli.progress import shown_progress
from dsv3_tools.cli.signals import stop_on_signals
from dsv3_tools.errors import VerificationFailed
from dsv3_tools.verify.integrity import verify_integrity

__all__ = ["integrity"]


@click.command("integrity")
@directory_argument("directory")
@click.option("--workers", type=click.IntRange(min=1), help="Files hashed at once.  [default: the cores]")
@json_option
@debug_option
@click.pass_context
def integrity(ctx: click.Context, directory: Path, *, workers: int | None, as_json: bool) -> None:
    """Compare every file with the manifest's SHA-256, and the index with the shards' headers.

    In a Hugging Face cache, whose files are named by their SHA-256, these are compared instead. Without
    either, index and headers are checked and nothing can be said of the data.

    \b
    Example:
      dsv3 verify integrity /tmp/mini-bf16
    """
    with stop_on_signals() as stop, shown_progress("verify integrity") as update:
        report = verify_integrity(directory, workers=workers, on_progress=update, stop=stop)
    if as_json:
        print_json(jsonable(report) | {"passed": report.passed})
    else:
        for problem in report.problems:
            print_line(f"  {problem}")
        verdict = "ok" if report.passed else "FAILED"
        checked = (
            f"{report.files_hashed} files, {size(report.nbytes_hashed)}, against the {report.hashes_from}"
        )
        if report.hashes_from is None:
            verdict = "structure ok, data not checked" if report.passed else verdict
            checked = "index against headers; there is no manifest to compare the data with"
        print_line(f"{verdict}: {directory}: {checked}")
    if report.passed:
        return
    count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems, the first"
    message = f"{directory}: {count}: {report.problems[0]}"
    if as_json:  # the one document is out; an exception would print another
        print_note(f"dsv3: {message}")
        ctx.exit(VerificationFailed.exit_code)
    raise VerificationFailed(message)
