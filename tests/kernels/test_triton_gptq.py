"""The logic of calibration's Triton kernels, on the CPU, in Triton's interpreter.

As in `test_triton_integer.py`; `tests/gpu/test_gptq_gpu.py` is the proof on the device, with scales in BF16,
which the interpreter does not round.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_tools.kernels import reference_gptq
from dsv3_tools.kernels.reference_gptq import Grid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")
GRIDS = {
    "int4": Grid(15, 7.5, 32, True, torch.float32),
    "asymmetric": Grid(15, 7.5, 64, False, torch.float32),
    "int8": Grid(255, 127.0, 192, True, torch.float32),
}


@pytest.mark.skipif(INTERPRETED, reason="this is the inner pytest")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-vvv", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "test_column_loop[16-int8] PASSED" in done.stdout


def weight(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 192, generator=torch.Generator().manual_seed(seed))


@inside
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("block", [16, 40])
def test_column_loop(grid: str, block: int) -> None:
    """Codes of the interpreter's arithmetic (its division is numpy's) on a factor of whole numbers."""
    from dsv3_tools.kernels import triton_gptq

    known, whole = GRIDS[grid], weight(21)
    scale, zero = reference_gptq.search_scales(whole, None, known)
    target = whole + 0.1 * weight(21, 1)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(2))[:block]
    groups = (order // known.group_size).to(torch.int32)
    factor = 0.3 * weight(192, 3)
    zeros = torch.full_like(scale, known.middle) if zero is None else zero
    here = slice(64, 64 + block)
    scales = scale.index_select(1, groups)
    expected = reference_gptq.quantize_columns(
        target[:, here],
        whole[:, here],
        scales,
        zeros.index_select(1, groups),
        factor[here, here],
        known.levels,
    )
    found = triton_gptq.quantize_columns(
        target[:, here], whole[:, here], scale, zero, groups, factor[here, here], known
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not torch.equal(
        found[0],
        reference_gptq.round_to_grid(target[:, here], scales, zeros.index_select(1, groups), known.levels)[
            0
        ].to(torch.uint8),
    )


@inside
@pytest.mark.parametrize("grid", GRIDS)
def test_search(grid: str) -> None:
    from dsv3_tools.kernels import triton_gptq

    known, values = GRIDS[grid], weight(11)
    values[0] = 0.0
    importance = torch.rand(192, generator=torch.Generator().manual_seed(4)) ** 4
    for counts in (None, importance):
        expected = reference_gptq.search_scales(values, counts, known)
        found = triton_gptq.search_scales(values, counts, known)
        assert torch.equal(found[0], expected[0])
        assert known.symmetric or torch.equal(found[1], expected[1])


@inside
def test_refuses_what_it_would_misread() -> None:
    from dsv3_tools.kernels import triton_gptq

    values, scale = weight(4), torch.ones(4, 6)
    groups = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(ValueError, match="strides"):
        triton_gptq.quantize_columns(
            values[:, :64].contiguous(), values[:, :64], scale, None, groups, values, GRIDS["int4"]
        )
