"""One weight: GPTQ against an independent float64 one, and what it must gain on inputs of known statistics.

Gains are in dB, over rounding with scales of the largest weight, on 8,192 tokens that no Hessian has seen;
1,024 inputs, 256 outputs, seeds 1 and 2. `benchmarks/gptq_gains.py` prints what they are.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3_tools.kernels import gptq
from dsv3_tools.kernels.reference_gptq import Grid
from dsv3_tools.kernels.reference_integer import quantize_int4_group, quantize_int8_channel, unpack_int4
from dsv3_tools.quantize.gram import Gram, shrink
from dsv3_tools.quantize.matrix import Coded, factorize, quantize_matrix

INT4 = Grid(15, 7.5, 128, True, torch.bfloat16)
CPU = torch.device("cpu")


def weight(rows: int = 256, columns: int = 1024, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram_of(x_TK: Tensor) -> Gram:
    gram = Gram(x_TK.shape[1], CPU)
    gram.add(x_TK)
    return gram


def absmax(weight_NK: Tensor, grid: Grid = INT4) -> Coded:
    scale_NG, zero_NG = gptq.search_scales(weight_NK, None, grid)
    codes_NK = gptq.nearest_codes(weight_NK, scale_NG, zero_NG, grid)
    return Coded(codes_NK, scale_NG, zero_NG, torch.ones(()))


def error(weight_NK: Tensor, coded: Coded, x_TK: Tensor, grid: Grid = INT4) -> float:
    return float((x_TK @ (weight_NK - coded.decode(grid)).t()).double().square().sum())


def gain(weight_NK: Tensor, coded: Coded, x_TK: Tensor) -> float:
    return 10 * math.log10(error(weight_NK, absmax(weight_NK), x_TK) / error(weight_NK, coded, x_TK))


GAINS = {
    # inputs, order by size: least gain of weighted scales, and of GPTQ; None asks for nothing
    ("white", True): (None, -0.5),
    ("ar 0.9", False): (None, 6.5),
    ("ar 0.95", False): (None, 9.2),
    ("power law", True): (None, 4.2),
    ("power law with outliers", True): (2.8, 7.5),
}


@pytest.mark.parametrize(("kind", "in_order"), GAINS)
def test_gains(inputs, kind: str, in_order: bool) -> None:
    weight_NK, hessian_KK = weight(), gram_of(inputs(kind, 8192, 1)).mean()
    held_out_TK = inputs(kind, 8192, 2)
    factor = factorize(hessian_KK, 0.01, in_order=in_order)
    least_rounded, least = GAINS[kind, in_order]
    coded = quantize_matrix(weight_NK, hessian_KK, INT4, factor)
    found = gain(weight_NK, coded, held_out_TK)
    assert found >= least
    if kind == "white":  # against rounding with the same kind of scales, too
        rounded = quantize_matrix(weight_NK, hessian_KK, INT4, None)
        assert found >= gain(weight_NK, rounded, held_out_TK) - 0.5
    assert found == pytest.approx(10 * math.log10(float(coded.predicted_gain)), abs=4.0)
    if least_rounded is not None:
        assert (
            gain(weight_NK, quantize_matrix(weight_NK, hessian_KK, INT4, None), held_out_TK) >= least_rounded
        )
    # The control: inputs that the Hessian is not of give nothing.
    if kind != "white":
        other = factorize(gram_of(inputs("white", 8192, 1)).mean(), 0.01)
        assert gain(weight_NK, quantize_matrix(weight_NK, hessian_KK, INT4, other), held_out_TK) < found - 1.0


@pytest.mark.parametrize("count", [256, 1024])
def test_few_tokens_lean_on_the_layers(inputs, count: int) -> None:
    """n = K tokens: at least 1 dB over an expert's own tokens alone, and never worse."""
    weight_NK, layer = weight(), gram_of(inputs("power law", 8192, 1))
    held_out_TK = inputs("power law", 8192, 2)
    own = gram_of(inputs("power law", count, 3))
    found = {}
    for name, hessian_KK in (("own", own.mean()), ("shrunk", shrink(own, layer))):
        coded = quantize_matrix(weight_NK, hessian_KK, INT4, factorize(hessian_KK, 0.01))
        found[name] = gain(weight_NK, coded, held_out_TK)
    assert found["shrunk"] >= found["own"] + 1.0


def test_without_tokens_there_is_the_layer(inputs) -> None:
    layer = gram_of(inputs("power law", 512, 1))
    assert torch.equal(shrink(Gram(1024, CPU), layer), layer.mean())
    many = gram_of(inputs("power law", 8192, 3))
    assert float((shrink(many, layer) - many.mean()).norm() / many.mean().norm()) < 0.12


def oracle(
    weight_NK: Tensor, hessian_KK: Tensor, scale_NG: Tensor, grid: Grid, damping: float
) -> tuple[list[int], Tensor, Tensor]:
    """GPTQ as it was published (inverse, its Cholesky factor, errors handed on), in float64, by columns.

    Returns the order of columns, codes, and how far each was from being another one.
    """
    H = hessian_KK.double().clone()
    H.diagonal().add_(damping * float(hessian_KK.diagonal().mean()))
    order = sorted(range(len(H)), key=lambda one: (-float(hessian_KK[one, one]), one))
    upper = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    W, group = weight_NK.double()[:, order].clone(), weight_NK.shape[1] // scale_NG.shape[1]
    codes, margins = torch.empty(weight_NK.shape, dtype=torch.int64), torch.empty(weight_NK.shape)
    for place, column in enumerate(order):
        s = scale_NG[:, column // group].double()
        quotient = W[:, place] / s
        q = (torch.round(quotient) + grid.middle).clamp(0, grid.levels)
        codes[:, column] = q.long()
        margins[:, column] = 0.5 - (quotient - torch.round(quotient)).abs()
        wrong = (W[:, place] - (q - grid.middle) * s) / upper[place, place]
        W[:, place + 1 :] -= wrong[:, None] * upper[place, place + 1 :]
    return order, codes, margins


@pytest.mark.parametrize("grid", [replace(INT4, group_size=32), Grid(255, 127.0, 96, True, torch.float32)])
@pytest.mark.parametrize("seed", range(6))
def test_codes_are_the_oracles(grid: Grid, seed: int) -> None:
    """Float32 may only decide what float64 leaves open: a row's first difference is at a tie."""
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(24, 96, generator=generator)
    mix = torch.randn(96, 96, generator=generator) * torch.logspace(0, -1, 96)
    hessian_KK = gram_of(torch.randn(400, 96, generator=generator) @ mix).mean()
    coded = quantize_matrix(weight_NK, hessian_KK, grid, factorize(hessian_KK, 0.01))
    order, expected, margins = oracle(weight_NK, hessian_KK, coded.scale_NG, grid, 0.01)
    differs = (coded.codes_NK.long() != expected)[:, order]
    rows = differs.any(1).nonzero().flatten().tolist()
    assert len(rows) <= 1
    for row in rows:
        first = order[int(differs[row].nonzero()[0])]
        assert margins[row, first] < 1e-3
    nearest = quantize_matrix(weight_NK, hessian_KK, grid, None)
    assert (nearest.codes_NK.long() != expected).float().mean() > 0.1  # the control


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equal_inputs_give_the_nearest_codes(group_size: int, symmetric: bool) -> None:
    grid = Grid(15, 7.5, group_size, symmetric, torch.bfloat16)
    weight_NK, hessian_KK = weight(40, 256), 3.0 * torch.eye(256)
    coded = quantize_matrix(weight_NK, hessian_KK, grid, factorize(hessian_KK, 0.01))
    nearest = quantize_matrix(weight_NK, hessian_KK, grid, None)
    assert torch.equal(coded.codes_NK, nearest.codes_NK)
    assert torch.equal(coded.scale_NG, nearest.scale_NG)


@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_scales_are_those_of_the_format(symmetric: bool) -> None:
    grid = Grid(15, 7.5, 64, symmetric, torch.bfloat16)
    weight_NK = weight(20, 256)
    coded = absmax(weight_NK, grid)
    packed, scale, zero = quantize_int4_group(weight_NK, group_size=64, symmetric=symmetric, search="absmax")
    assert torch.equal(coded.codes_NK, unpack_int4(packed))
    assert torch.equal(coded.scale_NG, scale.float())
    assert symmetric or torch.equal(coded.zero_NG.to(torch.uint8), zero)
    wide = absmax(weight_NK, Grid(255, 127.0, 256, True, torch.float32))
    codes, scale = quantize_int8_channel(weight_NK)
    assert torch.equal(wide.codes_NK.to(torch.int16) - 128, codes.to(torch.int16))
    assert torch.equal(wide.scale_NG, scale)


def test_rows_do_not_depend_on_each_other() -> None:
    """What lets gate and up be one matrix, and rows go to different programs."""
    weight_NK, hessian_KK = weight(48, 384), gram_of(weight(600, 384, seed=3)).mean()
    factor = factorize(hessian_KK, 0.01)
    whole = quantize_matrix(weight_NK, hessian_KK, INT4, factor)
    parts = [
        quantize_matrix(weight_NK[rows], hessian_KK, INT4, factor) for rows in (slice(0, 16), slice(16, 48))
    ]
    assert torch.equal(whole.codes_NK, torch.cat([part.codes_NK for part in parts]))


def test_a_hessian_without_a_factor_is_damped_more_and_more_then_left() -> None:
    good = gram_of(weight(600, 64, seed=3)).mean()
    assert factorize(good, 0.01).damping == 0.01
    least, mean = float(torch.linalg.eigvalsh(good)[0]), float(good.diagonal().mean())
    spoiled = good - (least + 0.025 * mean) * torch.eye(64)  # its least eigenvalue is below zero
    found = factorize(spoiled, 0.01)
    assert found is not None
    assert found.damping in (0.04, 0.08)
    assert factorize(good - (least + 0.3 * mean) * torch.eye(64), 0.01) is None
    assert factorize(torch.zeros(64, 64), 0.01) is None
    assert factorize(torch.full((64, 64), math.nan), 0.01) is None
    coded = quantize_matrix(weight(8, 64), good, replace(INT4, group_size=64), None)
    assert (coded.predicted_gain, coded.damping) == (1.0, None)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x_TK = weight(600, 128, seed=3)
    x_TK[:, 7:40] = 0.0
    hessian_KK = gram_of(x_TK).mean()
    weight_NK = weight(16, 128)
    coded = quantize_matrix(weight_NK, hessian_KK, INT4, factorize(hessian_KK, 0.01))
    assert torch.isfinite(coded.decode(INT4)).all()
    assert error(weight_NK, coded, x_TK) < error(weight_NK, absmax(weight_NK), x_TK)


def test_tokens_count_as_they_are_weighted(inputs) -> None:
    x_TK, counts_T1 = inputs("white", 64, 1), torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    gram = Gram(1024, CPU)
    gram.add(x_TK[:40], counts_T1[:40])
    gram.add(x_TK[40:], counts_T1[40:])
    gram.add(x_TK[:0], counts_T1[:0])
    expected = (x_TK.double() * counts_T1).t() @ x_TK.double() / counts_T1.sum()
    assert gram.tokens == 64
    assert torch.allclose(gram.mean().double(), expected, atol=1e-5)
    assert float(gram.weight) == pytest.approx(float(counts_T1.sum()))
