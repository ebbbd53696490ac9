"""What the rules expect of stored weights is what the formats write: one fact, said in two layers."""

from __future__ import annotations

import pytest

from dsv3_tools.engines.storage import storage_of
from dsv3_tools.formats import FORMATS, FP8Block
from dsv3_tools.formats.base import Format

SHAPE = (384, 512)
NAMES = {
    "bf16": "dense",
    "fp8_block": "fp8-block",
    "int8_block": "int8-block",
    "int8_channel": "int8-channel",
    "int4_packed": "int4-ct",
    "int4_gptq": "gptq",
    "int4_awq": "awq",
}
ALL = FORMATS | {"fp8_ct": FP8Block(scale_name="weight_scale")}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [SHAPE, (384, 128), (128, 512)], ids=str)
def test_every_format_is_known_to_the_rules(name: str, shape: tuple[int, int]) -> None:
    fmt = ALL[name]
    found = storage_of(tuple(sorted(fmt.parts(shape).items())), shape)
    assert found.format == ("fp8-ct-block" if name == "fp8_ct" else NAMES[fmt.name])
    assert found.shape == shape
    assert (found.missing, found.orphans, list(found.misshapen())) == ([], [], [])


@pytest.mark.parametrize("name", [name for name, fmt in ALL.items() if len(fmt.part_names) > 1])
def test_control_a_part_less_or_of_another_shape_is_noticed(name: str) -> None:
    fmt: Format = ALL[name]
    parts = dict(fmt.parts(SHAPE))
    assert fmt.scale_part is not None
    other = fmt.parts((768, 1024))[fmt.scale_part]
    wrong = storage_of(tuple(sorted((parts | {fmt.scale_part: other}).items())), SHAPE)
    assert list(wrong.misshapen()) or wrong.format != storage_of(tuple(sorted(parts.items())), SHAPE).format
    del parts[fmt.scale_part]
    assert storage_of(tuple(sorted(parts.items())), SHAPE).missing
