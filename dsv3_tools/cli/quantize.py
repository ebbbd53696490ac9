"""`dsv3 quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from dsv3_tools.checkpoint.source import Source
from dsv3_tools.cli.options import (
    calibration_options,
    directory_argument,
    run_options,
    selecting_options,
    source_argument,
)
from dsv3_tools.cli.run import execute
from dsv3_tools.conversion.pinning import pinned
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.quantize.api_int4 import open_quantize_int4
from dsv3_tools.quantize.api_int8 import open_quantize_int8
from dsv3_tools.quantize.options import calibrating_of

__all__ = ["int4", "int8"]


@click.command("int8")
@source_argument("source")
@directory_argument("destination")
@click.option(
    "--scheme",
    type=click.Choice(["channel", "block"]),
    default="channel",
    show_default=True,
    help="A scale for each row (vLLM, SGLang, Ascend) or for each 128 x 128 block (SGLang).",
)
@selecting_options
@calibration_options
@run_options
def int8(
    source: Source,
    destination: Path,
    *,
    scheme: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    mtp: str,
    method: str,
    calibration: Path | None,
    length: int | None,
    max_tokens: int | None,
    damping: float,
    dtype: str | None,
    memory: int | None,
    save_every: int,
    max_shard_size: int | None,
    partial: bool,
    **run: Any,
) -> None:
    """Quantize an FP8 or BF16 checkpoint to INT8, without a BF16 copy in between.

    Quantizes every linear but kv_b_proj, the router, lm_head and eh_proj; the rest becomes BF16. Blocks of an
    FP8 checkpoint keep most of their weights exactly. No calibration data is needed.

    \b
    Example:
      dsv3 quantize int8 miniature/checkpoint /tmp/mini-W8A8
    """
    calibrating = calibrating_of(
        method,
        nonfinite=run["nonfinite"],
        data=calibration,
        length=length,
        max_tokens=max_tokens,
        damping=damping,
        dtype=dtype,
        memory=memory,
        save_every=save_every,
        device=run["device"],
        ranks=Ranks.join(),
    )
    opened = open_quantize_int8(
        pinned(source, destination),
        scheme=scheme,
        include=include,
        exclude=exclude,
        mtp=mtp,
        max_shard_size=max_shard_size,
        partial=partial,
        calibrating=calibrating,
    )
    with opened as (plan, checkpoints, maker):
        execute(plan, checkpoints, destination, maker=maker, **run)


@click.command("int4")
@source_argument("source")
@directory_argument("destination")
@click.option(
    "--layout",
    type=click.Choice(["compressed-tensors", "gptq", "awq"]),
    default="compressed-tensors",
    show_default=True,
    help="How codes lie on disk; all three hold the same codes.",
)
@click.option(
    "--group-size",
    type=click.Choice([32, 64, 128]),
    default=128,
    show_default=True,
    help="Neighbours in a row that share a scale.",
)
@click.option(
    "--symmetric/--asymmetric",
    default=True,
    show_default=True,
    help="Without or with a zero point for each group.",
)
@click.option(
    "--scale-search",
    type=click.Choice(["mse", "absmax"]),
    default="mse",
    show_default=True,
    help="Take the scale with the smallest squared error, or that of the largest weight.",
)
@click.option(
    "--activations",
    type=click.Choice(["fp8"]),
    help="Have engines quantize the inputs of INT4 weights to FP8 (W4A8).  [default: BF16]",
)
@click.option(
    "--rest",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="What other linears are stored in.",
)
@selecting_options
@calibration_options
@run_options
def int4(
    source: Source,
    destination: Path,
    *,
    layout: str,
    group_size: int,
    symmetric: bool,
    scale_search: str,
    activations: str | None,
    rest: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    mtp: str,
    method: str,
    calibration: Path | None,
    length: int | None,
    max_tokens: int | None,
    damping: float,
    dtype: str | None,
    memory: int | None,
    save_every: int,
    max_shard_size: int | None,
    partial: bool,
    **run: Any,
) -> None:
    """Quantize the routed experts of a checkpoint to INT4, without a BF16 copy in between.

    Routed experts are 97 % of the parameters; everything else becomes BF16, or stays FP8 with --rest fp8.
    From a checkpoint that is INT4 already, codes with the same groups are moved, not quantized again.

    \b
    Example:
      dsv3 quantize int4 miniature/checkpoint /tmp/mini-W4A16
    """
    calibrating = calibrating_of(
        method,
        nonfinite=run["nonfinite"],
        data=calibration,
        length=length,
        max_tokens=max_tokens,
        damping=damping,
        dtype=dtype,
        memory=memory,
        save_every=save_every,
        device=run["device"],
        ranks=Ranks.join(),
    )
    opened = open_quantize_int4(
        pinned(source, destination),
        layout=layout,
        group_size=group_size,
        symmetric=symmetric,
        scale_search=scale_search,
        activations=activations,
        rest=rest,
        include=include,
        exclude=exclude,
        mtp=mtp,
        max_shard_size=max_shard_size,
        partial=partial,
        calibrating=calibrating,
    )
    with opened as (plan, checkpoints, maker):
        execute(plan, checkpoints, destination, maker=maker, **run)
