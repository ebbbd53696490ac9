"""`dsv3 convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from dsv3_tools.checkpoint.source import Source
from dsv3_tools.cli.options import (
    SOURCE,
    directory_argument,
    fixed_shards_options,
    run_options,
    source_argument,
)
from dsv3_tools.cli.run import execute
from dsv3_tools.conversion.api import open_bf16_to_fp8, open_fp8_to_bf16
from dsv3_tools.conversion.api_deepseek_infer import open_to_deepseek_infer
from dsv3_tools.conversion.api_integer import open_int4_to_bf16, open_int8_to_bf16
from dsv3_tools.conversion.pinning import pinned
from dsv3_tools.conversion.planning import LIKE

__all__ = ["bf16_to_fp8", "fp8_to_bf16", "int4_to_bf16", "int8_to_bf16", "to_deepseek_infer"]


@click.command("fp8-to-bf16")
@source_argument("source")
@directory_argument("destination")
@click.option(
    "--scale-semantics",
    type=click.Choice(["multiply", "inverse"]),
    help="Whether a weight is code x scale or code / scale.  [default: what config.json says]",
)
@run_options
def fp8_to_bf16(
    source: Source,
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
    opened = open_fp8_to_bf16(
        pinned(source, destination),
        max_shard_size=max_shard_size,
        scale_semantics=scale_semantics,
        partial=partial,
    )
    with opened as (plan, checkpoints):
        execute(plan, checkpoints, destination, **run)


@click.command("bf16-to-fp8")
@source_argument("source")
@directory_argument("destination")
@click.option(
    "--scale-fmt",
    type=click.Choice(["f32", "ue8m0"]),
    help="Scales as in V3 and R1, or powers of two as in V3.1.  [default: f32, or that of --like]",
)
@click.option(
    "--like",
    type=SOURCE,
    metavar="ORIGINAL_FP8",
    help="The FP8 checkpoint that SOURCE was made from: blocks that did not change get their bytes back.",
)
@run_options
def bf16_to_fp8(
    source: Source,
    destination: Path,
    *,
    scale_fmt: str | None,
    like: Source | None,
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
    opened = open_bf16_to_fp8(
        pinned(source, destination),
        scale_fmt=scale_fmt,
        like=None if like is None else pinned(like, destination, origin=LIKE),
        max_shard_size=max_shard_size,
        partial=partial,
    )
    with opened as (plan, checkpoints):
        execute(plan, checkpoints, destination, **run)


@click.command("int8-to-bf16")
@source_argument("source")
@directory_argument("destination")
@run_options
def int8_to_bf16(
    source: Source, destination: Path, *, max_shard_size: int | None, partial: bool, **run: Any
) -> None:
    """Rewrite an INT8 checkpoint as BF16.

    Reads blocks (SGLang) and channels (compressed-tensors). Whatever is FP8 beside them becomes BF16, too.

    \b
    Example:
      dsv3 convert int8-to-bf16 /tmp/mini-W8A8 /tmp/mini-W8A8-bf16
    """
    opened = open_int8_to_bf16(pinned(source, destination), max_shard_size=max_shard_size, partial=partial)
    with opened as (plan, checkpoints):
        execute(plan, checkpoints, destination, **run)


@click.command("int4-to-bf16")
@source_argument("source")
@directory_argument("destination")
@run_options
def int4_to_bf16(
    source: Source, destination: Path, *, max_shard_size: int | None, partial: bool, **run: Any
) -> None:
    """Rewrite an INT4 checkpoint as BF16.

    Reads compressed-tensors, GPTQ and AWQ, of any group size, with or without zero points. Whatever is FP8
    beside them becomes BF16, too.

    \b
    Example:
      dsv3 convert int4-to-bf16 /tmp/mini-W4A16 /tmp/mini-W4A16-bf16
    """
    opened = open_int4_to_bf16(pinned(source, destination), max_shard_size=max_shard_size, partial=partial)
    with opened as (plan, checkpoints):
        execute(plan, checkpoints, destination, **run)


@click.command("to-deepseek-infer")
@source_argument("source")
@directory_argument("destination")
@click.option(
    "--model-parallel",
    type=click.IntRange(min=1),
    required=True,
    metavar="N",
    help="Processes that will run the demo: each loads a shard of its own, with its part of the model.",
)
@fixed_shards_options
def to_deepseek_infer(
    source: Source, destination: Path, *, model_parallel: int, partial: bool, **run: Any
) -> None:
    """Cut a checkpoint into shards for DeepSeek's own inference demo.

    Takes FP8 as released, or BF16. Bytes are copied under the demo's names, one shard for each of N ranks;
    the MTP module, which the demo has not, is left out. The demo's --config is written beside them.

    \b
    Example:
      dsv3 convert to-deepseek-infer /tmp/mini-bf16 /tmp/mini-infer-mp4 --model-parallel 4
    """
    opened = open_to_deepseek_infer(
        pinned(source, destination), model_parallel=model_parallel, partial=partial
    )
    with opened as (plan, checkpoints):
        execute(plan, checkpoints, destination, **run)
