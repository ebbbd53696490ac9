"""How one weight is stored: one file for each format, all of them in `FORMATS`."""

from __future__ import annotations

from dsv3_tools.formats.base import Format, check_parts
from dsv3_tools.formats.dense import Dense
from dsv3_tools.formats.fp8_block import FP8Block
from dsv3_tools.formats.int4 import INT4, INT4Packed
from dsv3_tools.formats.int4_transposed import INT4AWQ, INT4GPTQ
from dsv3_tools.formats.int8 import INT8Block, INT8Channel

__all__ = [
    "FORMATS",
    "INT4",
    "INT4AWQ",
    "INT4GPTQ",
    "Dense",
    "FP8Block",
    "Format",
    "INT4Packed",
    "INT8Block",
    "INT8Channel",
    "check_parts",
]

FORMATS: dict[str, Format] = {
    "bf16": Dense("BF16"),
    "fp8_block": FP8Block(),
    "fp8_block_ue8m0": FP8Block(scale_fmt="ue8m0"),
    "int8_block": INT8Block(),
    "int8_channel": INT8Channel(),
    "int4_packed": INT4Packed(),
    "int4_packed_g32_asymmetric": INT4Packed(group_size=32, symmetric=False),
    "int4_packed_g64_absmax": INT4Packed(group_size=64, search="absmax"),
    "int4_gptq": INT4GPTQ(),
    "int4_awq": INT4AWQ(),
    "int4_awq_g64_asymmetric": INT4AWQ(group_size=64, symmetric=False),
}
"""Formats by name. The tests run over this dictionary: a format is covered by being in it."""
