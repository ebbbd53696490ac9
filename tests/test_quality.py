"""What quantization loses of trained weights: the shipped model's, against its FP8 checkpoint in float32."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3_tools
from dsv3_tools.formats.stored import find_weights, read_formats

FORMATS: dict[str, tuple[str, dict[str, Any], float]] = {
    # name: function, options, least dB; measured 44.1, 43.1, 19.1, 19.9, 20.4, 21.3, 22.3
    "INT8 block": ("quantize_int8", {"scheme": "block"}, 43.9),
    "INT8 channel": ("quantize_int8", {"scheme": "channel"}, 42.9),
    "INT4 g128 absmax": ("quantize_int4", {"scale_search": "absmax"}, 18.95),
    "INT4 g128": ("quantize_int4", {}, 19.75),
    "INT4 g64": ("quantize_int4", {"group_size": 64}, 20.3),
    "INT4 g32": ("quantize_int4", {"group_size": 32}, 21.15),
    "INT4 g32 asymmetric": ("quantize_int4", {"group_size": 32, "symmetric": False}, 22.1),
}

Weights = dict[str, torch.Tensor]


def decoded(directory: Path) -> tuple[Weights, set[str]]:
    """Returns all weights in float32, and the names of those stored as integers."""
    weights, integers = {}, set()
    with dsv3_tools.Checkpoint(directory) as checkpoint:
        formats = read_formats(checkpoint.config_json, "config.json")
        for weight in find_weights(checkpoint.specs, formats).weights:
            if weight.format.scale_part is not None:
                parts = {part: checkpoint.read(name) for part, name in weight.parts.items()}
                weights[weight.full_name] = weight.format.decode(parts, dtype="F32")
            if weight.format.code_dtype in ("I8", "I32"):
                integers.add(weight.full_name)
    return weights, integers


@pytest.fixture(scope="module")
def original(miniature: Path) -> Weights:
    return decoded(miniature)[0]


def decibels(original: Weights, found: Weights, names: set[str]) -> float:
    signal = sum(float(original[name].double().square().sum()) for name in names)
    error = sum(float((original[name].double() - found[name].double()).square().sum()) for name in names)
    return 10 * math.log10(signal / error)


@pytest.mark.parametrize("name", FORMATS)
def test_signal_to_noise(miniature: Path, original: Weights, tmp_path: Path, name: str) -> None:
    function, options, least = FORMATS[name]
    getattr(dsv3_tools, function)(miniature, tmp_path / "out", device="cpu", **options)
    found, integers = decoded(tmp_path / "out")
    experts = {name for name in original if ".mlp.experts." in name}
    assert integers == experts if function == "quantize_int4" else integers > experts
    measured = decibels(original, found, integers)
    assert least <= measured < least + 0.6
    # Control: one expert's scales a quarter too large are seen.
    spoilt = found | {min(experts): found[min(experts)] * 1.25}
    assert decibels(original, spoilt, {min(experts)}) < least - 2


def test_most_weights_of_int8_blocks_are_exact(miniature: Path, original: Weights, tmp_path: Path) -> None:
    """The FP8 codes' own grid is kept where it loses less; the control starts from BF16, which has none."""
    dsv3_tools.quantize_int8(miniature, tmp_path / "out", scheme="block", device="cpu")
    dsv3_tools.convert_fp8_to_bf16(miniature, tmp_path / "bf16", device="cpu")
    dsv3_tools.quantize_int8(tmp_path / "bf16", tmp_path / "control", scheme="block", device="cpu")

    def exact(directory: Path) -> float:
        found, integers = decoded(directory)
        same = sum(int((found[name] == original[name]).sum()) for name in integers)
        return same / sum(found[name].numel() for name in integers)

    assert exact(tmp_path / "out") >= 0.83
    assert exact(tmp_path / "control") < 0.1


def test_the_table_in_the_readme_is_that_of_the_script() -> None:
    """Nothing but a table between the marks, with a row for each format that the script measures."""
    root = Path(__file__).resolve().parents[1]
    text = (root / "README.md").read_text(encoding="utf-8")
    block = text.partition("<!-- quality: begin -->")[2].partition("<!-- quality: end -->")[0].strip()
    rows = [line.split("|")[1].strip() for line in block.splitlines() if line.startswith("|")]
    assert len(rows) == len(block.splitlines())
    tree = ast.parse((root / "benchmarks" / "quality.py").read_text(encoding="utf-8"))
    (formats,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FORMATS"
    )
    assert isinstance(formats, ast.Dict)
    assert rows[2:] == [key.value for key in formats.keys if isinstance(key, ast.Constant)]
