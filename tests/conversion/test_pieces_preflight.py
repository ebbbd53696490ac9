"""What is read before the first piece of integer weights: scales, and parts that follow from the shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.plan import ShardPlan, Step, TensorRef
from dsv3_tools.conversion.preflight import check_scales
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import CheckpointError
from dsv3_tools.formats import INT4, INT4GPTQ, Dense, FP8Block, INT4Packed, INT8Block, INT8Channel
from dsv3_tools.formats.base import Format
from tests.formats.weights import INT4_FORMATS, bits, lay_out, make_grid, make_weight

SHAPE = (16, 384)
TO_BF16 = Dense()


class Memory:
    """What a preflight needs of a checkpoint."""

    source = Path("here")

    def __init__(self, fmt: Format, parts: dict[str, Tensor]) -> None:
        self.specs: dict[str, TensorSpec] = {f"w.{part}": spec for part, spec in fmt.parts(SHAPE).items()}
        self._parts = parts

    def read_bytes(self, name: str) -> bytearray:
        return bytearray(bits(self._parts[name.removeprefix("w.")]))


def complaint(
    fmt: Format, parts: dict[str, Tensor], *, target: Format = TO_BF16, nonfinite: str = "error"
) -> str:
    """Returns what is wrong with a weight of `parts`; nothing if it would be recoded."""
    inputs = {part: TensorRef(f"w.{part}") for part in fmt.part_names}
    outputs = {part: f"w.{part}" for part in target.part_names}
    step = Step(SHAPE, inputs, outputs, fmt, target, fmt.code_dtype)
    shard = ShardPlan.build("x", [step])
    checkpoints: Any = {"source": Memory(fmt, parts)}
    try:
        check_scales([shard], checkpoints, nonfinite=nonfinite, stop=Stop())
    except CheckpointError as error:
        return str(error)
    return ""


def parts_of(fmt: Format) -> dict[str, Tensor]:
    if isinstance(fmt, INT4):
        return lay_out(fmt, make_grid(fmt, SHAPE))
    return fmt.encode(make_weight(SHAPE))


FORMATS_READ: dict[str, Format] = {
    **INT4_FORMATS,
    "int8_block": INT8Block(),
    "int8_channel": INT8Channel(),
    "fp8_named": FP8Block(scale_name="weight_scale"),
}


@pytest.mark.parametrize("name", FORMATS_READ)
def test_control_right_parts(name: str) -> None:
    assert complaint(FORMATS_READ[name], parts_of(FORMATS_READ[name])) == ""


@pytest.mark.parametrize("value", [0.0, -0.001, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", FORMATS_READ)
def test_scales_are_finite_and_positive(name: str, value: float) -> None:
    """In BF16, F16 and F32; the index is that of the tensor as it is stored."""
    fmt = FORMATS_READ[name]
    parts = parts_of(fmt)
    assert fmt.scale_part is not None
    scale = parts[fmt.scale_part]
    scale[-1, -1] = value
    found = complaint(fmt, parts)
    if value == -0.001 and isinstance(fmt, INT4):  # AutoRound writes signed scales
        assert found == ""
        return
    index = f"[{scale.shape[0] - 1}, {scale.shape[1] - 1}]"
    assert found.startswith(f"here: w.{fmt.scale_part}: the scale at {index} is ")
    assert ", expected a finite number " in found
    assert complaint(fmt, parts, nonfinite="keep") == ""


@pytest.mark.parametrize("name", FORMATS_READ)
def test_scales_are_plausible(name: str) -> None:
    fmt = FORMATS_READ[name]
    parts = parts_of(fmt)
    assert fmt.scale_part is not None
    parts[fmt.scale_part].fill_(1000.0)
    assert "weights would be multiplied by 1e+03, expected less than 1" in complaint(fmt, parts)


@pytest.mark.parametrize("name", [name for name, fmt in INT4_FORMATS.items() if fmt.fixed(SHAPE)])
def test_parts_that_follow_from_the_shape_hold_just_that(name: str) -> None:
    fmt = INT4_FORMATS[name]
    for part in fmt.fixed(SHAPE):
        parts = parts_of(fmt)
        parts[part] = parts[part].clone()
        parts[part].view(-1)[-1] += 1
        found = complaint(fmt, parts)
        weights = f"{fmt.name} weights of shape [16, 384]"
        assert found.startswith(f"here: w.{part}: does not hold what belongs to {weights} (by ")
        assert found.isprintable()
        moved = complaint(fmt, parts, target=INT4Packed(32))
        assert part in moved, "moving codes reads the part as little as decoding does"
        assert complaint(fmt, parts, target=fmt) == "", "a copy takes it as it is"


def test_gptq_of_the_other_version() -> None:
    """Read as the wrong one, every symmetric weight would be a step off."""
    first, second = INT4GPTQ(version=1), INT4GPTQ(version=2)
    assert "w.qzeros" in complaint(first, parts_of(second))
    assert "w.qzeros" in complaint(second, parts_of(first))


def test_columns_in_an_order_that_config_json_does_not_state() -> None:
    shuffled = parts_of(INT4GPTQ(32))
    shuffled["g_idx"] = shuffled["g_idx"].flip(0).contiguous()
    assert "w.g_idx: does not hold" in complaint(INT4GPTQ(32), shuffled)
    assert complaint(INT4GPTQ(32, act_order=True), shuffled) == ""


@pytest.mark.parametrize("index", [-1, 12, 2**31 - 1])
def test_columns_of_groups_that_do_not_exist(index: int) -> None:
    parts = parts_of(INT4GPTQ(32))
    parts["g_idx"][100] = index
    found = complaint(INT4GPTQ(32, act_order=True), parts)
    assert found.startswith("here: w.g_idx: g_idx names the groups ")
    assert found.endswith(", expected 0 to 11")
    assert str(index) in found


def test_all_problems_are_in_one_message() -> None:
    parts = parts_of(INT4GPTQ(32))
    parts["g_idx"][100] = 7
    parts["qzeros"].fill_(0)
    parts["scales"][0, 0] = torch.nan
    found = complaint(INT4GPTQ(32), parts)
    assert found.startswith("here: 3 problems: ")
    assert all(f"w.{part}: " in found for part in ("g_idx", "qzeros", "scales"))
