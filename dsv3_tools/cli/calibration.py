"""What calibration will take, and what it has gained, in lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3_tools.cli.output import print_line, print_note, print_table, size
from dsv3_tools.quantize.report import overview

__all__ = ["print_forecast", "print_report", "warn_of_few_tokens"]

_MANY = 0.25
"""Share of matrices with few tokens from which on the user is told."""

_PLACES = {"device": "on the device", "host": "in host memory", "file": "in a file"}


def print_forecast(found: Mapping[str, Any]) -> None:
    """Prints what a calibrated run will take."""
    processes = f" on {found['world_size']} devices" if found["world_size"] > 1 else ""
    print_line(
        f"  calibration with {found['tokens']} tokens: about {_duration(found['seconds'])} of "
        f"computing{processes}, by a short trial of this device"
    )
    print_line(
        f"  it takes at most about {size(found['device_nbytes'])} of memory on each device; hidden states "
        f"are {size(found['states_nbytes'])}, {_PLACES[found['states_place']]}; up to "
        f"{size(found['scratch_nbytes'])} of files lie beside the result until it is finished"
    )
    print_line(
        f"  disks have to read and write {size(int(found['least_disk_rate']))}/s together, or are what takes "
        "the time"
    )


def print_report(document: Mapping[str, Any]) -> None:
    """Prints what calibration has gained, by kind of weight."""
    lines = overview(document)
    if not lines:
        return
    tokens = document.get("calibration", {})
    recipe = document.get("recipe", {})
    print_line(
        f"  calibrated: {recipe.get('method')}, {tokens.get('sequences')} x {tokens.get('length')} tokens, "
        f"{tokens.get('held_out')} of the sequences held out"
    )
    rows = [("weights", "", "gain", "predicted", "error", "fewest tokens", "under K tokens", "damping")]
    for line in lines:
        gain = "" if line.gain is None else f"{line.gain:.1f} dB"
        error = "" if line.error is None else f"{line.error:.2%}"
        damping = "" if line.largest_damping is None else f"{line.largest_damping:g}"
        rows.append(
            (
                line.kind,
                f"{line.num_matrices:,} in {line.layers} layers",
                gain,
                f"{line.predicted_gain:.1f} dB" if line.largest_damping is not None else "",
                error,
                f"{line.least_tokens:,}",
                f"{line.few_tokens:,}",
                damping,
            )
        )
    print_table(rows, indent="    ")
    print_line("    gain: less output error than rounding with absmax scales, on tokens that were held out")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def warn_of_few_tokens(document: Mapping[str, Any]) -> None:
    """Says so on stderr when most weights have seen fewer tokens than they have inputs."""
    lines = overview(document)
    count, few = sum(line.num_matrices for line in lines), sum(line.few_tokens for line in lines)
    if few > count * _MANY:
        print_note(
            f"dsv3: {few:,} of {count:,} matrices saw fewer tokens than inputs (K): the figures say little, "
            "and the result may be worse than without calibration; give more tokens (--calibration)"
        )
