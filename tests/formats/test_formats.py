"""What every registered format promises; a format is covered by being in `FORMATS`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.formats import FORMATS, Dense, FP8Block, check_parts
from dsv3_tools.formats.base import Format
from tests.formats.weights import bits, expected_parts, expected_weight, make_weight

REDUCED = PRESETS["deepseek-v3"] | {
    "hidden_size": 7168 // 16,
    "intermediate_size": 18432 // 16,
    "kv_lora_rank": 512 // 16,
    "moe_intermediate_size": 2048 // 16,
    "n_routed_experts": 16,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "q_lora_rank": 1536 // 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 130,
}
"""DeepSeek-V3 with every width a sixteenth, the heads of attention fewer."""

SHAPES = sorted(
    {spec.shape for spec in dense_tensors(ModelConfig.from_dict(REDUCED)).values() if len(spec.shape) == 2}
    | {
        (1, 1),
        (1, 128),
        (128, 1),
        (127, 129),
        (129, 127),
        (128, 128),
        (256, 384),
        (576, 130),
        (5, 300),
        (300, 5),
    }
)


def error_bound(fmt: Format, weight: Tensor, parts: dict[str, Tensor], *, tightness: float = 1.0) -> Tensor:
    """Returns how far decode(encode(weight)), in float32, may be from a float64 `weight`.

    FP8: with q = weight / s and code = round(q), a normal code has 4 significant bits, so that
    |code - q| <= 2**-4 |q|; a subnormal one is a multiple of 2**-9, so that |code - q| <= 2**-10. Hence
    |code * s - weight| <= max(2**-4 |weight|, 2**-10 s). The quotient, the scale and the product are each
    rounded to float32, which adds at most 4 * 2**-24 |weight| (also where the clamp to 448 undoes the
    scale's).
    BF16: 8 significant bits, 2**-8 |weight|, and the smallest subnormal number's half.
    """
    magnitude = weight.abs()
    if isinstance(fmt, FP8Block):
        rows, columns = weight.shape
        scale = parts["weight_scale_inv"].double()
        scale = scale.repeat_interleave(fmt.block_size[0], 0)[:rows]
        scale = scale.repeat_interleave(fmt.block_size[1], 1)[:, :columns]
        return tightness * torch.maximum(2.0**-4 * magnitude, 2.0**-10 * scale) + 2.0**-22 * magnitude
    assert isinstance(fmt, Dense), f"no bound for {fmt.name}"
    return tightness * 2.0**-8 * magnitude + 2.0**-134


every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_format
@every_shape
def test_encoded_parts_have_the_promised_specs(fmt: Format, shape: tuple[int, ...]) -> None:
    promised = fmt.parts(shape)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        parts = fmt.encode(make_weight(shape, dtype))
        assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == {
            name: (spec.shape, torch_dtype(spec.dtype)) for name, spec in promised.items()
        }
        assert all(t.is_contiguous() for t in parts.values())
        assert sum(t.nbytes for t in parts.values()) == sum(spec.nbytes for spec in promised.values())
    assert check_parts(fmt, parts) == shape


@every_format
@every_shape
def test_the_bits_are_those_of_the_reference(fmt: Format, shape: tuple[int, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = make_weight(shape, dtype)
        parts = fmt.encode(weight)
        for name, expected in expected_parts(fmt, weight).items():
            assert bits(parts[name]) == bits(expected), name
        for name, out in (("BF16", torch.bfloat16), ("F32", torch.float32)):
            assert bits(fmt.decode(parts, dtype=name)) == bits(expected_weight(fmt, parts, out))
    assert bits(fmt.decode(parts)) == bits(fmt.decode(parts, dtype="BF16"))


@every_format
@every_shape
def test_decoding_what_was_encoded_stays_within_the_bound(fmt: Format, shape: tuple[int, ...]) -> None:
    weight = make_weight(shape, torch.float32)
    parts = fmt.encode(weight)
    error = (fmt.decode(parts, dtype="F32").double() - weight.double()).abs()
    assert (error <= error_bound(fmt, weight.double(), parts)).all()


@every_format
def test_control_the_bound_is_tight_and_finds_swapped_rows(fmt: Format) -> None:
    weight = make_weight((576, 448), torch.float32)
    parts = fmt.encode(weight)
    error = (fmt.decode(parts, dtype="F32").double() - weight.double()).abs()
    assert (error > error_bound(fmt, weight.double(), parts, tightness=0.9)).any()
    scrambled = {part: tensor.flip(0).contiguous() for part, tensor in parts.items()}
    error = (fmt.decode(scrambled, dtype="F32").double() - weight.double()).abs()
    assert not (error <= error_bound(fmt, weight.double(), scrambled)).all()


@every_format
def test_encoding_again_what_was_decoded_changes_nothing_more(fmt: Format) -> None:
    parts = fmt.encode(make_weight((300, 260)))
    weight = fmt.decode(parts, dtype="F32")
    once = fmt.decode(fmt.encode(weight), dtype="F32")
    assert torch.equal(fmt.decode(fmt.encode(once), dtype="F32"), once)


@every_format
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -448.0, 2.0**-100, 3 * 2.0**20])
def test_constant_weights(fmt: Format, value: float) -> None:
    weight = torch.full((130, 129), value, dtype=torch.bfloat16)
    assert bits(fmt.decode(fmt.encode(weight))) == bits(weight)


@every_format
def test_what_is_not_finite_is_counted(fmt: Format) -> None:
    weights = [make_weight((130, 140), seed=seed) for seed in range(3)]
    weights[1][3, 4] = torch.nan
    weights[1][129, 139] = torch.inf
    weights[2][0, 0] = -torch.inf
    specs = fmt.parts((130, 140))
    outs = [{n: torch.empty(s.shape, dtype=torch_dtype(s.dtype)) for n, s in specs.items()} for _ in weights]
    counts = fmt.encode_into(weights, outs)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [0, 2, 1]
    decoded = [torch.empty((130, 140), dtype=torch.bfloat16) for _ in weights]
    assert fmt.decode_into(outs, decoded).tolist() == [0, 2, 1]
    assert [int((~torch.isfinite(weight)).sum()) for weight in decoded] == [0, 2, 1]


@every_format
def test_a_group_is_coded_as_each_weight_alone(fmt: Format) -> None:
    weights = [make_weight(shape) for shape in [(130, 140), (1, 5), (256, 128)]]
    outs = [
        {n: torch.empty(s.shape, dtype=torch_dtype(s.dtype)) for n, s in fmt.parts(tuple(w.shape)).items()}
        for w in weights
    ]
    fmt.encode_into(weights, outs)
    for weight, out in zip(weights, outs, strict=True):
        alone = fmt.encode(weight)
        assert {name: bits(t) for name, t in out.items()} == {name: bits(t) for name, t in alone.items()}


@every_format
def test_stripes_at_the_row_alignment_are_coded_alone(fmt: Format) -> None:
    weight = make_weight((300, 200))
    whole = fmt.encode(weight)
    rows = fmt.row_alignment * -(-100 // fmt.row_alignment)
    top, bottom = fmt.encode(weight[:rows]), fmt.encode(weight[rows:])
    for name, tensor in whole.items():
        assert bits(tensor) == bits(top[name]) + bits(bottom[name])


@every_format
def test_encoding_does_not_change_its_argument(fmt: Format) -> None:
    weight = make_weight((130, 140)).t()
    before = weight.clone()
    fmt.encode(weight)
    assert torch.equal(weight, before)
    assert bits(fmt.encode(weight)["weight"]) == bits(fmt.encode(weight.contiguous())["weight"])
