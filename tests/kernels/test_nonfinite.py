"""Counting what is not finite agrees with a decoding of each dtype that shares no code with the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tools.kernels.nonfinite import count_nonfinite, first_nonfinite

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def oracle(data: np.ndarray, dtype: str) -> list[int]:
    """Returns the indices of elements that torch, in float64, says are not finite."""
    if data.size == 0:  # torch cannot view an empty array in a wider dtype
        return []
    values = torch.from_numpy(data.copy()).view(DTYPES[dtype]).to(torch.float64)
    return (~values.isfinite()).nonzero().flatten().tolist()


def check(data: np.ndarray, dtype: str) -> None:
    bad = oracle(data, dtype)
    assert count_nonfinite(data, dtype) == len(bad)
    assert first_nonfinite(data, dtype) == (bad[0] if bad else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_the_top_bits(dtype: str) -> None:
    """All bit patterns of one- and two-byte dtypes; of wider ones all top halves, lowest bit 0 and 1."""
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    if size == 1:
        data = np.arange(256, dtype=np.uint8)
    else:
        top = np.arange(65536, dtype=np.uint64) << np.uint64(8 * size - 16)
        patterns = top if size == 2 else np.concatenate([top, top | np.uint64(1)])
        data = patterns.astype(f"<u{size}").view(np.uint8)
    check(data, dtype)
    for one in data.reshape(-1, size)[:: max(1, data.size // size // 300)]:
        check(one, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 4095, 4096, 9999, 10000])
def test_one_number_anywhere(dtype: str, position: int) -> None:
    values = torch.randn(10001, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    check(values.view(torch.uint8).numpy(), dtype)
    values[position] = torch.tensor(float("nan")).to(DTYPES[dtype])
    data = values.view(torch.uint8).numpy()
    assert count_nonfinite(data, dtype) == 1
    assert first_nonfinite(data, dtype) == position


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    num_elements=st.integers(0, 9000),
    seed=st.integers(0, 2**31),
)
def test_random_bytes(dtype: str, num_elements: int, seed: int) -> None:
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    check(np.random.default_rng(seed).integers(0, 256, num_elements * size, dtype=np.uint8), dtype)


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "F8_E8M0"])
def test_other_dtypes_hold_nothing_to_find(dtype: str) -> None:
    data = np.full(64, 0xFF, dtype=np.uint8)
    assert count_nonfinite(data, dtype) == 0
    assert first_nonfinite(data, dtype) is None


def test_read_only_bytes_at_an_odd_address() -> None:
    data = np.frombuffer(b"\0" + np.array([1.0, np.inf, np.nan], dtype="<f4").tobytes(), dtype=np.uint8)[1:]
    assert not data.flags.writeable
    check(data, "F32")
