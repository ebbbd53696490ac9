"""Errors measured from codes are those measured from weights that the reference decodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_tools.formats import INT4, Dense, Format, FP8Block, INT4Packed, INT8Block, INT8Channel
from dsv3_tools.kernels import reference
from dsv3_tools.kernels.compare import BLOCK, BlockErrors, Steps, compare_blocks
from dsv3_tools.kernels.cpu_errors import Coded, measure_codes

ORIGINALS: dict[str, Format] = {"fp8": FP8Block(), "bf16": Dense("BF16"), "f32": Dense("F32")}
CODED: dict[str, Format] = {
    "int8 channel": INT8Channel(),
    "int8 block": INT8Block(),
    "int8 block 32": INT8Block((64, 32)),
    "int4": INT4Packed(group_size=32),
    "int4 asymmetric": INT4Packed(group_size=64, symmetric=False),
    "int4 absmax": INT4Packed(group_size=128, search="absmax"),
    "fp8": FP8Block(),
    "fp8 64": FP8Block((64, 64)),
}
SHAPES = [(128, 128), (8, 128), (136, 384), (264, 640)]
CLAMP = 12.0

Parts = dict[str, torch.Tensor]


def weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Weights of which some are zero, some far out, some nearly subnormal codes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.02
    values[torch.rand(shape, generator=generator) < 0.02] = 0.0
    values[torch.rand(shape, generator=generator) < 0.01] *= 1e-4
    values[torch.rand(shape, generator=generator) < 0.001] *= 20
    return values


def coded(fmt: Format, parts: Parts) -> Coded:
    """Returns the parts as the kernel takes them."""
    if isinstance(fmt, Dense):
        return Coded.floats(
            parts["weight"].view(torch.uint16 if fmt.dtype == "BF16" else torch.uint32).numpy()
        )
    if isinstance(fmt, INT4):
        packed, scales, zeros = fmt.load(parts)
        size = 8 * packed.shape[1] // scales.shape[1]
        return Coded(
            packed.numpy(), scales.float().numpy(), None if zeros is None else zeros.numpy(), (1, size)
        )
    values, scales = parts["weight"], parts[str(fmt.scale_part)].numpy()
    block_size = (1, values.shape[1]) if isinstance(fmt, INT8Channel) else fmt.block_size  # type: ignore[attr-defined]
    return Coded(
        (values.view(torch.uint8) if isinstance(fmt, FP8Block) else values).numpy(), scales, None, block_size
    )


def steps_of(fmt: Format, codes: Coded) -> Steps:
    low = -128.0 if not isinstance(fmt, INT4) else -8.0 if codes.zeros is None else -codes.zeros.astype("f4")
    span = None if isinstance(fmt, FP8Block) else 15.0 if isinstance(fmt, INT4) else 255.0
    return Steps(
        1 / codes.scales, np.broadcast_to(np.float32(low), codes.scales.shape).copy(), span, codes.block_size
    )


def decoded(fmt: Format, parts: Parts) -> torch.Tensor:
    """Returns the weight in float32; FP8 by the definition, not by the kernels."""
    if isinstance(fmt, FP8Block):
        scales = parts[fmt.scale_name]
        return reference.dequantize_fp8_block(
            parts["weight"], scales, block_size=fmt.block_size, dtype=torch.float32
        )
    return fmt.decode(parts, dtype="F32")


def expected(original: torch.Tensor, other: torch.Tensor, steps: Steps, slack: float) -> BlockErrors:
    found = BlockErrors.zeros(*original.shape)
    bits = [t.view(torch.uint32).numpy() for t in (original, other)]
    compare_blocks(*bits, found, top=0, steps=steps, slack=slack, clamp=CLAMP)
    return found


def assert_equal(found: BlockErrors, wanted: BlockErrors) -> None:
    for name, a, b in zip(BlockErrors._fields, found, wanted, strict=True):
        if name in ("signal", "error"):
            np.testing.assert_allclose(a, b, rtol=3e-6, err_msg=name)
        elif name == "steps":  # elsewhere they may be too many
            np.testing.assert_allclose(a.max(), b.max(), rtol=1e-6, err_msg=name)
            assert (a >= b * (1 - 1e-6)).all()
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def case(original: str, other: str, shape: tuple[int, int], seed: int = 0) -> tuple[Any, ...]:
    """Returns both as `Coded`, what `compare_blocks` finds, and the slack."""
    finer, lossy = ORIGINALS[original], CODED[other]
    parts = finer.encode(weight(shape, seed))
    base = decoded(finer, parts)
    codes = lossy.encode(base)
    slack = 2.0**-8 if original == "bf16" else 0.0
    ours, theirs = coded(finer, parts), coded(lossy, codes)
    return ours, theirs, expected(base, decoded(lossy, codes), steps_of(lossy, theirs), slack), slack


def in_file(side: Coded, path: Path, at_once: int) -> tuple[Coded, int]:
    """Returns the same rows in a file behind some other bytes, and its descriptor."""
    path.write_bytes(b"garbage" + side.values.tobytes() + b"more")
    descriptor = os.open(path, os.O_RDONLY)
    return side._replace(values=np.empty_like(side.values[:at_once]), place=(descriptor, 7)), descriptor


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", CODED)
@pytest.mark.parametrize("original", ORIGINALS)
def test_errors_are_those_of_decoded_weights(original: str, other: str, shape: tuple[int, int]) -> None:
    ours, theirs, wanted, slack = case(original, other, shape)
    found = BlockErrors.zeros(*shape)
    farthest = measure_codes(ours, theirs, found, rows=shape[0], top=0, slack=slack, clamp=CLAMP)
    assert farthest == found.steps.max()
    assert (farthest > 0.1) == (original != other)  # the same format makes the same codes
    assert_equal(found, wanted)


@pytest.mark.parametrize("columns", [32, 96, 160, 192, 416])
@pytest.mark.parametrize("other", ["int8 channel", "int8 block 32", "int4", "fp8"])
@pytest.mark.parametrize("original", ORIGINALS)
def test_columns_that_end_within_a_block(original: str, other: str, columns: int) -> None:
    ours, theirs, wanted, slack = case(original, other, (40, columns), seed=columns)
    found = BlockErrors.zeros(40, columns)
    assert measure_codes(ours, theirs, found, rows=40, top=0, slack=slack, clamp=CLAMP) is not None
    assert_equal(found, wanted)


@pytest.mark.parametrize("at_once", [1, 7, 128, 1000])
@pytest.mark.parametrize("other", ["int8 channel", "int8 block", "int4 asymmetric"])
def test_rows_of_files_and_stripes(tmp_path: Path, other: str, at_once: int) -> None:
    """However many rows are read at once, and wherever a call begins."""
    rows, columns = 392, 256
    ours, theirs, wanted, _ = case("fp8", other, (rows, columns), seed=at_once)
    found, last = BlockErrors.zeros(rows, columns), None
    for top, height in ((0, 256), (256, 128), (384, 8)):
        stripe = slice(top, top + height)
        sides, descriptors = [], []
        for side in (ours, theirs):
            tall = slice(top // side.block_size[0], -(-(top + height) // side.block_size[0]))
            zeros = None if side.zeros is None else side.zeros[tall]
            part = side._replace(values=side.values[stripe], scales=side.scales[tall].copy(), zeros=zeros)
            read, descriptor = in_file(part, tmp_path / str(len(sides)), at_once)
            sides.append(read)
            descriptors.append(descriptor)
        last = measure_codes(*sides, found, rows=height, top=top, clamp=CLAMP)
        for descriptor in descriptors:
            os.close(descriptor)
    assert last == found.steps.max()
    assert_equal(found, wanted)


def test_every_code(tmp_path: Path) -> None:
    """All e4m3 numbers against all INT8 codes, subnormal products included."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    values = np.resize(np.repeat(codes, 256), (508, 128))
    others = np.resize(np.tile(np.arange(256).astype(np.int8), 254), (508, 128))
    for scale, step in ((0.01, 0.03), (2.0**-126, 2.0**-126), (-0.5, 1.7), (3e-39, 2e-38)):
        scales = np.full((4, 1), scale, "f4"), np.full((508, 1), step, "f4")
        weights = (
            torch.from_numpy(values.copy()).view(torch.float8_e4m3fn).float() * torch.from_numpy(scales[0])[0]
        )
        coarse = torch.from_numpy(others.astype("f4") * scales[1])
        theirs = Coded(others, scales[1], None, (1, 128))
        found = BlockErrors.zeros(508, 128)
        measure_codes(Coded(values, scales[0], None, (128, 128)), theirs, found, rows=508, top=0, clamp=CLAMP)
        assert_equal(found, expected(weights, coarse, steps_of(INT8Channel(), theirs), 0.0))


@pytest.mark.parametrize("other", ["int8 channel", "int8 block", "int4", "int4 absmax"])
@pytest.mark.parametrize("original", ORIGINALS)
def test_one_wrong_code_is_found_anywhere(original: str, other: str) -> None:
    shape, chance = (200, 384), np.random.default_rng(1)
    ours, theirs, wanted, slack = case(original, other, shape)
    assert wanted.steps.max() < 0.6  # the negative control: none is wrong yet
    for _ in range(40):
        row, column = int(chance.integers(shape[0])), int(chance.integers(shape[1]))
        values = theirs.values.copy()
        if theirs.values.dtype == np.int8:
            values[row, column] += 2 if values[row, column] < 0 else -2
        else:  # the highest of a code's four bits
            values[row, column // 8] ^= np.uint32(8 << 4 * (column % 8)).astype(np.int32)
        found = BlockErrors.zeros(*shape)
        clamp = 1.0  # or the wrong code may pass for a clamped one
        farthest = measure_codes(
            ours, theirs._replace(values=values), found, rows=shape[0], top=0, slack=slack, clamp=clamp
        )
        assert farthest is not None
        assert farthest > 1.2
        place = np.unravel_index(int(np.argmax(found.steps)), found.steps.shape)
        assert place == (row // BLOCK, column // BLOCK)


def refused(ours: Coded, theirs: Coded, rows: int = 8) -> bool:
    found = BlockErrors.zeros(rows, ours.values.shape[1])
    farthest = measure_codes(ours, theirs, found, rows=rows, top=0)
    assert farthest is not None or not any(field.any() for field in found)
    return farthest is None


def changed(side: Coded, place: Sequence[int], number: float, *, scale: bool = False) -> Coded:
    array = (side.scales if scale else side.values).copy()
    array[tuple(place)] = number
    return side._replace(scales=array) if scale else side._replace(values=array)


@pytest.mark.parametrize("other", ["int8 channel", "int4"])
def test_what_compare_blocks_has_to_measure(tmp_path: Path, other: str) -> None:
    ours, theirs, _, _ = case("fp8", other, (8, 256))
    floats, _, _, _ = case("bf16", other, (8, 256))
    assert not refused(ours, theirs)
    assert not refused(floats, theirs)
    for nan in (0x7F, 0xFF):
        assert refused(changed(ours, (7, 255), nan), theirs)
    for bits in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF):
        assert refused(changed(floats, (3, 100), bits), theirs)
    for scale in (np.nan, np.inf, 1e30):
        assert refused(changed(ours, (0, 1), scale, scale=True), theirs)
    for scale in (np.nan, np.inf, 0.0, -1.0, 1e-40, 1e30):
        assert refused(ours, changed(theirs, (5, 0), scale, scale=True))
    assert refused(theirs, ours)  # in integer codes
    short, descriptor = in_file(theirs, tmp_path / "short", 8)
    os.truncate(tmp_path / "short", (tmp_path / "short").stat().st_size - 5)
    assert refused(ours, short)
    os.close(descriptor)
    assert refused(ours, short)


def test_nan_among_e4m3_codes_of_the_lossy_side() -> None:
    ours, theirs, _, _ = case("bf16", "fp8", (8, 256))
    assert not refused(ours, theirs)
    assert refused(ours, changed(theirs, (7, 1), 0xFF))


@pytest.mark.parametrize("columns", [8, 40, 100])
def test_other_widths(columns: int) -> None:
    ours = Coded.floats(np.zeros((8, columns), np.uint16))
    assert refused(ours, Coded(np.zeros((8, columns), np.int8), np.ones((8, 1), "f4"), None, (1, columns)))
