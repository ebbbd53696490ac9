"""`dsv3 sample`."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.cli.options import debug_option, directory_argument, json_option
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line
from dsv3_tools.conversion.sample import sample as make_sample

__all__ = ["sample"]


@click.command("sample")
@directory_argument("destination")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="deepseek-v3", show_default=True)
@click.option("--weights", type=click.Choice(["fp8", "fp8-ue8m0", "bf16"]), default="fp8", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Number of layers, instead of the model's.")
@click.option(
    "--experts", type=click.IntRange(min=1), help="Number of routed experts, instead of the model's."
)
@click.option(
    "--shards",
    type=click.IntRange(min=1, max=99_999),
    help="Number of files, fewer where the tensors do not divide so.",
)
@click.option("--sparse", is_flag=True, help="Headers only: data are holes that take no room.")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=0, show_default=True)
@json_option
@debug_option
def sample(
    destination: Path,
    *,
    preset: str,
    weights: str,
    layers: int | None,
    experts: int | None,
    shards: int | None,
    sparse: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Make a checkpoint of real shapes with random weights, to measure or to try things out on.

    \b
    Example:
      dsv3 sample /tmp/v3-headers --sparse
    """
    result = make_sample(
        destination,
        preset=preset,
        weights=weights,
        layers=layers,
        experts=experts,
        shards=shards,
        sparse=sparse,
        seed=seed,
    )
    if as_json:
        print_json(jsonable(result))
    else:
        print_line(
            f"wrote {result.num_tensors:,} tensors, {result.nbytes:,} bytes, in {result.num_shards} shards "
            f"to {result.destination}"
        )
