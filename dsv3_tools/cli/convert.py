"""`dsv3 convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from dsv3_tools.cli.options import directory_argument, run_options
from dsv3_tools.cli.run import execute
from dsv3_tools.conversion.api import open_bf16_to_fp8, open_fp8_to_bf16

__all__ = ["bf16_to_fp8", "fp8_to_bf16"]


@click.command("fp8-to-bf16")
@directory_argument("source")
@directory_argument("destination")
@click.option(
    "--scale-semantics",
    type=click.Choice(["multiply", "inverse"]),
    help="Whether a weight is code x scale or code / scale.  [default: what config.json says]",
)
@run_options
def fp8_to_bf16(
    source: Path,
    destination: Path,
    *,
    scale_semantics: str | None,
    max_shard_size: int | None,
    partial: bool,
    **run: Any,
) -> None:
    """Rewrite an FP8 checkpoint as BF16.

    Every FP8 weight becomes BF16 (float32 product with its scale, rounded once), scales go, everything
    else is copied byte for byte, the MTP module included. config.json loses its quantization_config. An
    interrupted run goes on when the same command is run again.

    \b
    Example:
      dsv3 convert fp8-to-bf16 miniature/checkpoint /tmp/mini-bf16
    """
    with open_fp8_to_bf16(
        source, max_shard_size=max_shard_size, scale_semantics=scale_semantics, partial=partial
    ) as (
        plan,
        checkpoints,
    ):
        execute(plan, checkpoints, destination, **run)


@click.command("bf16-to-fp8")
@directory_argument("source")
@directory_argument("destination")
@click.option(
    "--scale-fmt",
    type=click.Choice(["f32", "ue8m0"]),
    help="Scales as in V3 and R1, or powers of two as in V3.1.  [default: f32, or that of --like]",
)
@click.option(
    "--like",
    type=click.Path(path_type=Path),
    metavar="ORIGINAL_FP8",
    help="The FP8 checkpoint that SOURCE was made from: blocks that did not change get their bytes back.",
)
@run_options
def bf16_to_fp8(
    source: Path,
    destination: Path,
    *,
    scale_fmt: str | None,
    like: Path | None,
    max_shard_size: int | None,
    partial: bool,
    **run: Any,
) -> None:
    """Rewrite a BF16 checkpoint in DeepSeek's FP8 layout.

    Quantizes what the released checkpoints store in FP8, in blocks of 128 x 128, and copies the rest
    (embeddings, norms, router, lm_head, eh_proj) byte for byte. config.json gets the quantization_config.

    \b
    Example:
      dsv3 convert bf16-to-fp8 /tmp/mini-bf16 /tmp/mini-fp8 --like miniature/checkpoint
    """
    with open_bf16_to_fp8(
        source, scale_fmt=scale_fmt, like=like, max_shard_size=max_shard_size, partial=partial
    ) as (
        plan,
        checkpoints,
    ):
        execute(plan, checkpoints, destination, **run)
