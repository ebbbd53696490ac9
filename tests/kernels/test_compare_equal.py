"""Equality of files and of weights is found exactly where it is, and one changed bit anywhere ends it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_tools.kernels import reference
from dsv3_tools.kernels.cpu_equal import are_equal_weights, equal_nbytes, first_difference
from dsv3_tools.kernels.cpu_errors import Coded

ROOM = 4096  # bytes
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)


def test_first_difference() -> None:
    a = np.arange(10_000, dtype="u4").view("u1")[:39_997]
    assert first_difference(a, a.copy()) == -1
    for place in (0, 7, 8, 12_345, 39_990, 39_996):
        b = a.copy()
        b[place] ^= 1
        assert first_difference(a, b) == place


# ---------------------------------------------------------------------------------------------------- bytes


class Pair:
    """Two files, whose bytes begin at different offsets."""

    def __init__(self, folder: Path) -> None:
        self.paths = folder / "a", folder / "b"
        self.descriptors: list[int] = []

    def write(self, *contents: bytes) -> None:
        self.close()
        for offset, path, content in zip((3, 11), self.paths, contents, strict=True):
            path.write_bytes(bytes(offset) + content + b"x" * offset)
            self.descriptors.append(os.open(path, os.O_RDONLY))

    def equal(self, nbytes: int, dtype: str = "U8") -> int:
        rooms = [np.empty(ROOM // 8, np.uint64) for _ in range(2)]
        return equal_nbytes(list(zip(self.descriptors, (3, 11), strict=True)), rooms, nbytes, dtype)

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    files = Pair(tmp_path)
    yield files
    files.close()


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, ROOM - 1, ROOM, ROOM + 1, 5 * ROOM + 13])
def test_equal_bytes(pair: Pair, nbytes: int) -> None:
    content = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    pair.write(content.tobytes(), content.tobytes())
    assert pair.equal(nbytes) == nbytes
    for place in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        other = content.copy()
        other[place] ^= 0x10
        pair.write(content.tobytes(), other.tobytes())
        assert pair.equal(nbytes) == place // ROOM * ROOM


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_that_are_not_finite(pair: Pair, dtype: str) -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    size = values.element_size()
    data = values.view(torch.uint8).numpy()
    pair.write(data.tobytes(), data.tobytes())
    assert pair.equal(data.size, dtype) == data.size
    for place in (0, 1234, 2999):
        bad = values.clone()
        bad[place] = float("nan")
        content = bad.view(torch.uint8).numpy().tobytes()
        pair.write(content, content)
        assert pair.equal(data.size, dtype) == place * size // ROOM * ROOM
        assert pair.equal(data.size) == data.size  # as bytes they are equal


def test_a_file_that_ends_early(pair: Pair) -> None:
    pair.write(bytes(3 * ROOM), bytes(3 * ROOM))
    os.truncate(pair.paths[1], 11 + 2 * ROOM + 5)
    assert pair.equal(3 * ROOM) == 2 * ROOM
    pair.close()
    pair.descriptors = [1 << 20, 1 << 20]  # of no file
    assert pair.equal(ROOM) == 0
    pair.descriptors = []


# -------------------------------------------------------------------------------------------------- weights


def made(
    shape: tuple[int, int], block_size: tuple[int, int], scales: np.ndarray | None = None, seed: int = 0
):
    """Returns random codes, all of them among them, and the BF16 weights that the reference decodes."""
    chance = np.random.default_rng(seed)
    codes = np.resize(chance.permutation(np.resize(FINITE, max(shape[0] * shape[1], 254))), shape)
    grid = tuple(-(-size // block) for size, block in zip(shape, block_size, strict=True))
    scales = chance.lognormal(-8, 2, grid).astype("f4") if scales is None else np.resize(scales, grid)
    weights = reference.dequantize_fp8_block(
        torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales), block_size=block_size
    )
    return Coded(codes, scales, None, block_size), Coded.floats(weights.view(torch.uint16).numpy().copy())


@pytest.mark.parametrize("block_size", [(128, 128), (64, 64), (1, 128), (128, 4096)])
@pytest.mark.parametrize("shape", [(1, 64), (128, 128), (130, 192), (300, 576)])
def test_equal_weights(shape: tuple[int, int], block_size: tuple[int, int]) -> None:
    codes, words = made(shape, block_size)
    assert are_equal_weights(codes, words, shape[0])
    chance = np.random.default_rng(2)
    for _ in range(60):
        row, column, bit = (int(chance.integers(n)) for n in (*shape, 16))
        words.values[row, column] ^= 1 << bit
        assert not are_equal_weights(codes, words, shape[0]), (row, column, bit)
        words.values[row, column] ^= 1 << bit
    assert are_equal_weights(codes, words, shape[0])


def test_every_code_and_scale() -> None:
    """Products that are subnormal, that are 0, and that lie half-way between two BF16 numbers."""
    half_way = [np.float32(k * 2.0**-20) for k in range(257, 513, 2)]
    scales = np.array([*half_way, 0.0, 2.0**-149, 1e-40, 2.0**-126, 127.99999, 1.0], "f4")
    codes, words = made((64 * scales.size, 64), (64, 64), scales, seed=1)
    assert are_equal_weights(codes, words, codes.values.shape[0])
    for block in range(scales.size):  # every code of every block, one unit off
        top = 64 * block
        block_codes = codes._replace(
            values=codes.values[top : top + 64], scales=codes.scales[block : block + 1]
        )
        row, column = divmod(block * 37 % 4096, 64)
        off = words.values[top : top + 64].copy()
        off[row, column] += 1
        assert not are_equal_weights(block_codes, Coded.floats(off), 64)


@pytest.mark.parametrize("at_once", [1, 50, 128])
def test_rows_of_files(tmp_path: Path, at_once: int) -> None:
    codes, words = made((300, 192), (128, 128))
    sides, descriptors = [], []
    for side in (codes, words):
        path = tmp_path / str(len(sides))
        path.write_bytes(b"12345" + side.values.tobytes())
        descriptors.append(os.open(path, os.O_RDONLY))
        sides.append(side._replace(values=np.empty_like(side.values[:at_once]), place=(descriptors[-1], 5)))
    assert are_equal_weights(*sides, 300)
    assert not are_equal_weights(*sides, 301)  # there are not so many
    with (tmp_path / "1").open("r+b") as file:
        file.seek(5 + 2 * (299 * 192 + 191))
        file.write(b"\1\1")
    assert not are_equal_weights(*sides, 300)
    for descriptor in descriptors:
        os.close(descriptor)


def test_what_the_caller_has_to_look_at() -> None:
    codes, words = made((128, 192), (128, 128))
    for nan, spelled in ((0x7F, 0x7FC0), (0xFF, 0x7FC0), (0xFF, 0xFFC0)):
        with_nan, as_words = codes.values.copy(), words.values.copy()
        with_nan[100, 190], as_words[100, 190] = nan, spelled
        assert not are_equal_weights(codes._replace(values=with_nan), Coded.floats(as_words), 128)
    for scale in (-0.5, -0.0, 128.0, 1e30, np.inf, np.nan):
        scales = codes.scales.copy()
        scales[0, 1] = scale
        assert not are_equal_weights(codes._replace(scales=scales), words, 128)
    codes, words = made((8, 96), (128, 128))
    assert not are_equal_weights(codes, words, 8)  # no multiple of 64 columns


def test_processors_without_byte_tables() -> None:
    """They multiply and round: the same tests, compiled for a processor of 2008."""
    if platform.machine() != "x86_64":
        pytest.skip("the name of a processor of another kind")
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-q",
        "-k",
        "weights or code",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""}
    if os.environ.get("NUMBA_CPU_NAME") == "nehalem":
        return
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout
