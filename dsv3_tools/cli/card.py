"""`dsv3 card`."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from dsv3_tools.cli.options import debug_option, directory_argument, json_option
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line
from dsv3_tools.conversion.card import card as write_card

__all__ = ["card"]


@click.command("card")
@directory_argument("directory")
@click.option(
    "--figures",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="What verify logits, tensors or mtp printed with --json about DIRECTORY. May be repeated.",
)
@json_option
@debug_option
def card(directory: Path, *, figures: tuple[Path, ...], as_json: bool) -> None:
    """Write the model card of a result again: README.md, with front matter for the Hugging Face Hub.

    Every command that writes a checkpoint writes one. What stands before and after the generated part is
    kept, and so are keys of the front matter that are not what was generated.

    \b
    Example:
      dsv3 card /tmp/mini-bf16
    """
    result = write_card(directory, figures=figures)
    if as_json:
        print_json(jsonable(result))
        return
    shown = f", with figures of verify {', '.join(result.figures)}" if result.figures else ""
    print_line(f"{'wrote' if result.written else 'unchanged:'} {result.path}{shown}")
