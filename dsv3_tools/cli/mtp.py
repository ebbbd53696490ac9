"""`dsv3 split-mtp` and `dsv3 merge-mtp`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from dsv3_tools.checkpoint.source import Source
from dsv3_tools.cli.options import DIRECTORY, directory_argument, run_options, shared_option, source_argument
from dsv3_tools.cli.run import execute, execute_together
from dsv3_tools.conversion.api_mtp import open_merge_mtp, open_split_mtp
from dsv3_tools.conversion.mtp_merge import MTP
from dsv3_tools.conversion.pinning import pinned

__all__ = ["merge_mtp", "split_mtp"]


@click.command("split-mtp")
@source_argument("source")
@click.option(
    "--main",
    type=DIRECTORY,
    metavar="DIR",
    help="Where the model without its MTP module goes.",
)
@click.option("--mtp", type=DIRECTORY, metavar="DIR", help="Where the MTP module goes.")
@click.option(
    "--layout",
    type=click.Choice(["native", "sglang-nextn"]),
    default="native",
    show_default=True,
    help="The module under its own layer number (vLLM, LMDeploy), or as layer 0 (SGLang, LightLLM).",
)
@click.option(
    "--drop-shared",
    is_flag=True,
    help="Leave embed_tokens and shared_head.head, which the model has too, out of the module.",
)
@shared_option
@run_options
def split_mtp(
    source: Source,
    *,
    main: Path | None,
    mtp: Path | None,
    layout: str,
    drop_shared: bool,
    allow_different_shared: bool,
    max_shard_size: int | None,
    partial: bool,
    **run: Any,
) -> None:
    """Take the MTP module out of a checkpoint in any format: the model without it, the module, or both.

    Bytes are only copied. The model gets num_nextn_predict_layers 0, and lists of what is not quantized
    follow. What the module repeats of the model (embed_tokens, shared_head.head) is compared bit for bit.
    merge-mtp makes the source again.

    \b
    Example:
      dsv3 split-mtp miniature/checkpoint --main /tmp/mini-noMTP --mtp /tmp/mini-MTP
      dsv3 split-mtp miniature/checkpoint --mtp /tmp/mini-NextN --layout sglang-nextn
    """
    opened = open_split_mtp(
        pinned(source, main, mtp),
        main=main,
        mtp=mtp,
        layout=layout,
        drop_shared=drop_shared,
        allow_different_shared=allow_different_shared,
        max_shard_size=max_shard_size,
        partial=partial,
    )
    with opened as (parts, checkpoints):
        execute_together(parts, checkpoints, **run)


@click.command("merge-mtp")
@source_argument("main")
@source_argument("mtp")
@directory_argument("destination")
@shared_option
@run_options
def merge_mtp(
    main: Source,
    mtp: Source,
    destination: Path,
    *,
    allow_different_shared: bool,
    max_shard_size: int | None,
    partial: bool,
    **run: Any,
) -> None:
    """Put an MTP module back beside a model, whatever the format of each.

    MTP is what split-mtp wrote, in either layout, or a checkpoint that has a module. Bytes are only copied;
    config.json says afterwards how many MTP layers there are and what of them is not quantized. What does
    not belong together is refused: other dimensions, formats that one config.json cannot describe, a module
    whose embed_tokens or shared_head.head is not the model's. Halves of one checkpoint become that one again.

    \b
    Example:
      dsv3 merge-mtp /tmp/mini-noMTP /tmp/mini-MTP /tmp/mini-whole
    """
    opened = open_merge_mtp(
        pinned(main, destination),
        pinned(mtp, destination, origin=MTP),
        allow_different_shared=allow_different_shared,
        max_shard_size=max_shard_size,
        partial=partial,
    )
    with opened as (plan, checkpoints):
        execute(plan, checkpoints, destination, **run)
