"""How a check's verdict is printed, and how it ends: exit code 4 if anything is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsv3_tools.cli.output import print_line, print_note
from dsv3_tools.errors import VerificationFailed

if TYPE_CHECKING:
    import click

__all__ = ["finish", "print_findings", "verdict"]

_MAX_PROBLEMS = 20


def verdict(problems: Sequence[str]) -> str:
    """Returns the first word of a check's result."""
    return "FAILED" if problems else "ok"


def print_findings(problems: Sequence[str], notes: Sequence[str]) -> None:
    """Prints what is wrong, and what is odd."""
    for problem in problems[:_MAX_PROBLEMS]:
        print_line(f"  wrong: {problem}")
    if len(problems) > _MAX_PROBLEMS:
        print_line(f"  and {len(problems) - _MAX_PROBLEMS:,} more problems; --json has them all")
    for note in notes:
        print_line(f"  note: {note}")


def finish(ctx: click.Context, what: str, problems: Sequence[str], *, as_json: bool) -> None:
    """Ends a check that has been printed, with exit code 4 if there are problems."""
    if not problems:
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems, the first"
    message = f"{what}: {count}: {problems[0]}"
    if as_json:  # the one document is out; an exception would print another
        print_note(f"dsv3: {message}")
        ctx.exit(VerificationFailed.exit_code)
    raise VerificationFailed(message)
