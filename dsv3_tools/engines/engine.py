"""The shape of the data about engines: formats by name, and what there is to say about an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["FORMATS", "Engine", "Level", "Support"]

Level = Literal["loads", "flag", "refused", "misread"]

FORMATS: Mapping[str, str] = {
    "bf16": "BF16",
    "fp8-block": "FP8 blocks",
    "int8-block": "INT8 blocks",
    "int8-channel": "INT8 channels (compressed-tensors)",
    "int4-ct": "INT4 (compressed-tensors)",
    "gptq": "INT4 GPTQ",
    "awq": "INT4 AWQ",
    "w4afp8": "W4AFP8",
    "w4a8-ct": "INT4 with FP8 activations (compressed-tensors)",
    "fp8-ct-block": "FP8 blocks (compressed-tensors)",
    "fp8-ct-channel": "FP8 channels (compressed-tensors)",
    "w8a8-int8": "INT8 channels (`w8a8_int8`)",
}
"""Formats by name, and what the documentation calls them."""


@dataclass(frozen=True)
class Support:
    """How an engine takes a format.

    Attributes:
        level: whether it loads as it is, loads with what `note` says, is refused, or misread.
        note: what it needs, or what happens.
        source: file or issue, and how it is known.
    """

    level: Level
    note: str
    source: str


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: as `--engine` takes it.
        title: as its makers write it.
        version: what the entries are about.
        family: whose matching of ignore lists it has.
        formats: support by format; what is not there is refused.
        methods: where the quantization methods that it knows are listed.
        architectures: those of config.json's that it knows; empty if it does not look at them.
        fused: what it reads as one weight: "q_a and kv_a", "gate and up", "experts".
        kv_b: for a format, whether `kv_b_proj` must be "quantized" or "dense" in it, and the source.
        leftover: what it does with a `quantization_config` over weights that are not quantized.
        group_sizes: of INT4 that it accepts; empty for all.
        skips_mtp: whether it never looks at the MTP module.
        unknown_names: what it does with tensors that it does not know.
    """

    name: str
    title: str
    version: str
    family: str
    formats: Mapping[str, Support]
    methods: str
    architectures: frozenset[str]
    fused: frozenset[str]
    kv_b: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    leftover: Support = field(default_factory=lambda: Support("misread", "", ""))
    group_sizes: frozenset[int] = frozenset()
    skips_mtp: bool = False
    unknown_names: Level = "refused"

    def support(self, name: str) -> Support:
        """Returns how this engine takes a format."""
        missing = Support("refused", "does not know it", self.methods)
        return self.formats.get(name, missing)
