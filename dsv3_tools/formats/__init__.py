"""How one weight is stored: one file for each format, all of them in `FORMATS`."""

from __future__ import annotations

from dsv3_tools.formats.base import Format, check_parts
from dsv3_tools.formats.dense import Dense
from dsv3_tools.formats.fp8_block import FP8Block

__all__ = ["FORMATS", "Dense", "FP8Block", "Format", "check_parts"]

FORMATS: dict[str, Format] = {
    "bf16": Dense("BF16"),
    "fp8_block": FP8Block(),
    "fp8_block_ue8m0": FP8Block(scale_fmt="ue8m0"),
}
"""Formats by name. The tests run over this dictionary: a format is covered by being in it."""
