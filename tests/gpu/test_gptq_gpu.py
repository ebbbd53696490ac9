"""Calibration's Triton kernels on a GPU, against `reference_gptq.py` there; a whole run against the CPU's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dsv3_tools
from dsv3_tools.kernels import reference_gptq
from dsv3_tools.kernels.reference_gptq import Grid

pytestmark = pytest.mark.gpu

GRIDS = {
    "int4": Grid(15, 7.5, 128, True, torch.bfloat16),
    "int4 g32": Grid(15, 7.5, 32, True, torch.bfloat16),
    "int4 asymmetric": Grid(15, 7.5, 64, False, torch.bfloat16),
    "int8": Grid(255, 127.0, 1024, True, torch.float32),
}
ROWS = (16, 33, 200)


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, device="cuda")
    values[:, 5] *= 40.0
    values[0, :7] = 0.0
    return values


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block", [128, 96, 32])
def test_column_loop_is_the_definitions_bit_for_bit(grid: str, rows: int, block: int) -> None:
    from dsv3_tools.kernels import triton_gptq

    known = GRIDS[grid]
    whole = weight(rows, 1024)
    scale, zero = reference_gptq.search_scales(whole, torch.rand(1024, device="cuda"), known)
    target = whole + 0.1 * weight(rows, 1024, seed=1)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(2)).cuda()[:block]
    groups = (order // known.group_size).to(torch.int32)
    factor = 0.3 * torch.randn(1024, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    zeros = torch.full_like(scale, known.middle) if zero is None else zero
    here = slice(256, 256 + block)
    expected = reference_gptq.quantize_columns(
        target[:, here],
        whole[:, here],
        scale.index_select(1, groups),
        zeros.index_select(1, groups),
        factor[here, here],
        known.levels,
    )
    found = triton_gptq.quantize_columns(
        target[:, here], whole[:, here], scale, zero, groups, factor[here, here], known
    )
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    control = factor[here, here].clone()
    control[0, 1] += 1.0
    changed = triton_gptq.quantize_columns(
        target[:, here], whole[:, here], scale, zero, groups, control, known
    )
    assert not torch.equal(found[1], changed[1])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rows", ROWS)
def test_scales_are_as_good_as_the_definitions(grid: str, rows: int) -> None:
    from dsv3_tools.kernels import triton_gptq

    known = GRIDS[grid]
    values = weight(rows, 1024)
    importance = torch.rand(1024, device="cuda", generator=torch.Generator("cuda").manual_seed(4)) ** 4
    expected = reference_gptq.search_scales(values, importance, known)
    found = triton_gptq.search_scales(values, importance, known)
    plain = triton_gptq.search_scales(values, None, known)
    assert torch.equal(plain[0], reference_gptq.search_scales(values, None, known)[0])
    assert (found[0] == expected[0]).float().mean() > 0.99
    costs = []
    for scale, zero in (expected, found, plain):
        groups = values.reshape(rows, -1, known.group_size)
        zeros = torch.full_like(scale, known.middle) if zero is None else zero
        _, rounded = reference_gptq.round_to_grid(groups, scale[..., None], zeros[..., None], known.levels)
        counts = importance.reshape(1, -1, known.group_size)
        costs.append(((groups - rounded) ** 2 * counts).sum(2))
    assert torch.allclose(costs[0], costs[1], rtol=1e-5)
    assert (costs[1] <= costs[2] * (1 + 1e-5)).all()
    assert known.levels == 255 or float(costs[2].sum()) > 1.02 * float(costs[1].sum())


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_run_gains_what_it_gains_on_the_cpu(miniature: Path, tmp_path: Path, dtype: str) -> None:
    gains = {}
    for device in ("cpu", "cuda:0"):
        out = tmp_path / device.replace(":", "")
        dsv3_tools.quantize_int4(
            miniature, out, method="gptq", device=device, dtype=dtype if device != "cpu" else "F32"
        )
        report = json.loads((out / "dsv3_quantization.json").read_bytes())
        gains[device] = [line["gain"] for line in report["summary"]]
    assert gains["cpu"] == pytest.approx(gains["cuda:0"], abs=0.4)
    assert min(gains["cuda:0"]) > 0.5


def test_two_runs_are_the_same_bytes(miniature: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        dsv3_tools.quantize_int4(miniature, tmp_path / name, method="gptq", device="cuda:0")
    one, two = (
        json.loads((tmp_path / name / "dsv3_manifest.json").read_bytes())["files"] for name in ("one", "two")
    )
    assert one == two
