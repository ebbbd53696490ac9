"""`dsv3 push`."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from dsv3_tools.cli.options import TARGET, debug_option, directory_argument, json_option
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line, size
from dsv3_tools.cli.signals import stop_on_signals
from dsv3_tools.conversion.hub_target import PushTarget
from dsv3_tools.conversion.push import PushResult
from dsv3_tools.conversion.push import push as push_checkpoint

__all__ = ["push"]


@click.command("push")
@directory_argument("directory")
@click.argument("repo", type=TARGET, metavar="ORG/NAME[@BRANCH]")
@click.option("--revision", metavar="BRANCH", help="The branch, made if need be.  [default: main]")
@click.option("--private", is_flag=True, help="If the model is made, make it private.")
@click.option("--create-pr", is_flag=True, help="Propose a pull request instead of writing to main.")
@click.option("--overwrite", is_flag=True, help="Replace another model that is there.")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; send nothing.")
@json_option
@debug_option
def push(
    directory: Path,
    repo: PushTarget,
    *,
    revision: str | None,
    private: bool,
    create_pr: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload a finished checkpoint to the Hugging Face Hub.

    The model and the branch are made if they are not there. Shards go first; config.json, index, manifest and
    card in the last commit, so that nothing half-uploaded is taken for a model. Run again after an
    interruption, it sends what is missing. A directory in which a conversion has not finished is refused.

    \b
    Example:
      dsv3 push /tmp/mini-bf16 my-name/mini-bf16 --dry-run
    """
    with stop_on_signals() as stop:
        result = push_checkpoint(
            directory,
            repo,
            revision=revision,
            private=private,
            create_pr=create_pr,
            overwrite=overwrite,
            dry_run=dry_run,
            stop=stop,
        )
    if as_json:
        print_json(jsonable(result))
    else:
        _print(result, dry_run=dry_run)


def _print(result: PushResult, *, dry_run: bool) -> None:
    print_line(f"push: {result.directory} -> {result.repo}, {result.revision}")
    there = f", of which {size(result.nbytes_there)} were there already" if result.nbytes_there else ""
    print_line(f"  {len(result.files)} files, {size(result.nbytes)}{there}")
    if result.left_out:
        print_line(f"  never uploaded: {', '.join(result.left_out)}")
    print_line(
        "  nothing was sent (--dry-run)" if dry_run else f"  uploaded: {result.url}, commit {result.commit}"
    )
