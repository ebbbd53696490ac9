"""Unquantized weights: rounded once, one spelling of NaN."""

from __future__ import annotations

import pytest
import torch

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.formats import Dense


def test_dense_rounds_once_to_nearest_even() -> None:
    halfway = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -(1 + 2.0**-8)])
    expected = torch.tensor([1.0, 1 + 2.0**-6, 1 + 2.0**-7, -1.0])
    assert torch.equal(Dense().encode(halfway)["weight"].float(), expected)


@pytest.mark.parametrize("source", ["F32", "F16", "F64"])
def test_dense_spells_nan_in_one_way(source: str) -> None:
    for size in (1, 7, 64, 1000):  # vectorized and scalar paths of torch spell it differently
        weight = torch.full((size,), torch.nan, dtype=torch_dtype(source))
        weight[::2] = -weight[::2]
        for out, integer, nan in (
            (torch.bfloat16, torch.int16, 0x7FC0),
            (torch.float32, torch.int32, 0x7FC0_0000),
        ):
            if torch_dtype(source) == out:
                continue
            decoded = torch.empty(size, dtype=out)
            assert Dense(source).decode_into([{"weight": weight}], [decoded]).tolist() == [size]
            assert (decoded.view(integer) == nan).all()


def test_control_torch_alone_spells_nan_otherwise() -> None:
    weight = torch.full((64,), torch.nan)
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("seen with AVX2 and AVX512")
    assert not (weight.bfloat16().view(torch.int16) == 0x7FC0).all()
