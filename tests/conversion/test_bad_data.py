"""Sources that are not what they claim to be: refused with tensor and index, before a byte where possible."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import dsv3_tools
from dsv3_tools.errors import CheckpointError, FormatError, PlanError, UsageError

UP = "model.layers.1.mlp.experts.1.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
NAN, INF = b"\xc0\x7f", b"\x80\xff"


def shard_of(shards, tensor: str):
    return next(tensors for tensors in shards.values() if tensor in tensors)


# Scales: all of them are read before the destination is created.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -0.25])
def test_impossible_scale(fp8_case, tools, tmp_path, value):
    tools.poke(fp8_case.source, f"{UP}.weight_scale_inv", 1, struct.pack("<f", value))
    with pytest.raises(CheckpointError, match=rf"{UP}\.weight_scale_inv: the scale at \[0, 1\] is {value}"):
        fp8_case.convert(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_impossible_scales_come_in_one_message(fp8_case, tools, tmp_path):
    other = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    tools.poke(fp8_case.source, f"{UP}.weight_scale_inv", 0, struct.pack("<f", 0.0))
    tools.poke(fp8_case.source, other, 1, struct.pack("<f", float("nan")))
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        fp8_case.convert(tmp_path / "out")
    assert f"{UP}.weight_scale_inv" in str(caught.value)
    assert other in str(caught.value)


def test_impossible_scale_of_like(cases, tools, tmp_path):
    own = cases["bf16-to-fp8-like"].with_own_source(tmp_path / "own")
    tools.poke(own.like, f"{UP}.weight_scale_inv", 1, struct.pack("<f", float("nan")))
    with pytest.raises(CheckpointError, match=rf"{UP}\.weight_scale_inv: the scale at \[0, 1\] is nan"):
        own.convert(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def invert_scales(shards) -> None:
    for tensors in shards.values():
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].reciprocal()


def test_reciprocal_scales_are_recognised(fp8_case, tools, tmp_path):
    tools.edit(fp8_case.source, invert_scales)
    with pytest.raises(CheckpointError, match=r"are its scales reciprocals\?"):
        fp8_case.convert(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with dsv3_tools.Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.specs}


def assert_nearly_equal(folder: Path, other: Path) -> None:
    """A reciprocal taken twice may be off by one float32 step, so by one BF16 step after rounding."""
    one, two = weights_of(folder), weights_of(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        steps, wanted = (
            t.view({2: torch.int16, 4: torch.int32}[t.element_size()]) for t in (tensor, two[name])
        )
        assert (steps.long() - wanted.long()).abs().max() <= 1, name


@pytest.mark.parametrize("told_by", ["config.json", "option"])
def test_inverse_semantics(fp8_case, tools, tmp_path, told_by):
    tools.convert_quickly(fp8_case, tmp_path / "plain")
    tools.edit(fp8_case.source, invert_scales)
    options = {}
    if told_by == "option":
        options["scale_semantics"] = "inverse"
    else:
        change = {"weight_scale_semantics": "inverse"}
        tools.edit_config(fp8_case.source, lambda config: config["quantization_config"].update(change))
    tools.convert_quickly(fp8_case, tmp_path / "out", **options)
    assert_nearly_equal(tmp_path / "out", tmp_path / "plain")


def test_multipliers_called_inverse_are_recognised(fp8_case, tools, tmp_path):
    change = {"weight_scale_semantics": "inverse"}
    tools.edit_config(fp8_case.source, lambda config: config["quantization_config"].update(change))
    with pytest.raises(CheckpointError, match="are its scales multipliers"):
        fp8_case.convert(tmp_path / "out")
    tools.convert_quickly(fp8_case, tmp_path / "out", scale_semantics="multiply")
    found, wanted = tools.snapshot(tmp_path / "out"), fp8_case.expected
    assert [n for n in wanted if n.endswith(".safetensors") and found[n] != wanted[n]] == []


@pytest.mark.parametrize("semantics", ["multiply", "inverse"])
def test_given_semantics_must_be_plausible_too(fp8_case, tools, tmp_path, semantics):
    if semantics == "multiply":
        tools.edit(fp8_case.source, invert_scales)
    with pytest.raises(CheckpointError, match="weights would be multiplied by"):
        fp8_case.convert(tmp_path / "out", scale_semantics=semantics)
    assert not (tmp_path / "out").exists()


def test_unknown_semantics_are_refused(fp8_case, tmp_path):
    with pytest.raises(UsageError, match="scale_semantics: got 'Inverse'"):
        fp8_case.convert(tmp_path / "out", scale_semantics="Inverse")


# Elements: found while they are converted; no shard with one gets a final name.


@pytest.mark.parametrize("code", [b"\x7f", b"\xff"])
def test_fp8_nan(fp8_case, tools, tmp_path, code):
    tools.poke(fp8_case.source, f"{UP}.weight", 5 * 160 + 7, code)
    with pytest.raises(CheckpointError, match=rf"{UP}\.weight: the element at \[5, 7\] is NaN or infinite"):
        fp8_case.convert(tmp_path / "out")
    assert not tools.violations(tmp_path / "out", fp8_case.expected)
    assert not list(tmp_path.glob("out/.dsv3/*.tmp"))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("tensor", [f"{UP}.weight", "model.embed_tokens.weight"])
def test_bf16_that_is_not_finite(bf16_case, tools, tmp_path, tensor, value):
    tools.poke(bf16_case.source, tensor, 33 * 160 + 159, value)
    with pytest.raises(CheckpointError, match=rf"{tensor}: the element at \[33, 159\] is NaN or infinite"):
        bf16_case.convert(tmp_path / "out")
    assert not tools.violations(tmp_path / "out", bf16_case.expected)


def test_copied_tensors_that_are_not_finite(case, tools, tmp_path):
    own = case.with_own_source(tmp_path / "own")
    norm, bias = here(case, NORM), here(case, BIAS)
    tools.poke(own.source, norm, 159, NAN)
    with pytest.raises(CheckpointError, match=rf"{norm}: the element at \[159\] is NaN or infinite"):
        own.convert(tmp_path / "out")
    tools.poke(own.source, norm, 159, b"\x80\x3f")
    tools.poke(own.source, bias, 1, struct.pack("<f", float("inf")))
    with pytest.raises(CheckpointError, match=rf"{bias}: the element at \[1\] is NaN or infinite"):
        own.convert(tmp_path / "other")


def poison(tools, case, chance) -> dict[str, int]:
    """Puts NaN and infinities into the source; returns how many elements of each tensor they make."""
    fp8 = case.source_kind == "fp8"
    wanted = {NORM: 3, BIAS: 1}
    if case.source_kind in ("fp8", "bf16"):  # integers have no NaN
        wanted |= {f"{UP}.weight": 5, "model.layers.0.self_attn.o_proj.weight": 2}
    for name, count in wanted.items():
        size = {NORM: 160, BIAS: 2}.get(name, 96 * 64)
        for element in chance.sample(range(size), count):
            if name == BIAS:
                data = struct.pack("<f", float("nan"))
            elif name == NORM or not fp8:
                data = chance.choice([NAN, INF])
            else:
                data = chance.choice([b"\x7f", b"\xff"])
            tools.poke(case.source, here(case, name), element, data)
    return {here(case, name): count for name, count in wanted.items()}


def here(case, name: str) -> str:
    """Returns the tensor's name in a layer that the case reads: the MTP module's, if only that one."""
    return re.sub(r"layers\.\d", "layers.5", name) if case.output == "mtp" else name


def test_kept_elements_are_counted(case, tools, tmp_path, chance):
    own = case.with_own_source(tmp_path / "own")
    wanted = poison(tools, own, chance)
    result = tools.convert_quickly(own, tmp_path / "out", nonfinite="keep", workers=2)
    assert result.nonfinite == wanted
    manifest = json.loads((tmp_path / "out" / tools.manifest).read_bytes())
    assert manifest["nonfinite"] == dict(sorted(wanted.items()))
    found = weights_of(tmp_path / "out")
    if own.operation == "convert fp8-to-bf16":
        counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in found.items()}
        assert {name: count for name, count in counts.items() if count} == wanted
        bits = found[f"{UP}.weight"].view(torch.int16).numpy().astype(np.uint16)
        assert set(bits[(bits & 0x7F80) == 0x7F80].tolist()) == {0x7FC0}


def test_kept_elements_are_counted_over_a_resume(case, tools, tmp_path, chance):
    own = case.with_own_source(tmp_path / "own")
    wanted = poison(tools, own, chance)
    tools.convert_quickly(own, tmp_path / "once", nonfinite="keep")
    tools.killed_before_last_shard(own, tmp_path / "out", nonfinite="keep")
    result = tools.convert_quickly(own, tmp_path / "out", nonfinite="keep")
    assert result.shards_resumed == 2
    assert result.nonfinite == wanted
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), tools.snapshot(tmp_path / "once"))


def test_shards_that_kept_elements_are_not_resumed_by_a_run_that_refuses_them(case, tools, tmp_path):
    own = case.with_own_source(tmp_path / "own")
    tools.poke(own.source, here(case, NORM), 7, NAN)
    tools.killed_before_last_shard(own, tmp_path / "out", nonfinite="keep")
    with pytest.raises(
        CheckpointError, match=rf"{here(case, NORM)}: the element at \[7\] is NaN or infinite"
    ):
        own.convert(tmp_path / "out")


def test_kept_scales(fp8_case, tools, tmp_path):
    tools.poke(fp8_case.source, f"{UP}.weight_scale_inv", 1, struct.pack("<f", float("nan")))
    result = tools.convert_quickly(fp8_case, tmp_path / "out", nonfinite="keep")
    assert result.nonfinite == {f"{UP}.weight": 96 * 32}  # the second block of a [96, 160] weight


def test_unknown_policy(case, tmp_path):
    with pytest.raises(UsageError, match="nonfinite: got 'ignore'"):
        case.convert(tmp_path / "out", nonfinite="ignore")


# What the planner refuses, from headers alone.


def refused(case, out: Path, match: str, kind: type[Exception] = PlanError, **options) -> str:
    with pytest.raises(kind, match=match) as caught:
        case.convert(out, **options)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def retype(name: str, make):
    def change(shards) -> None:
        tensors = shard_of(shards, name)
        tensors[name] = make(tensors[name])

    return change


def add(name: str, tensor: torch.Tensor):
    return lambda shards: next(iter(shards.values())).update({name: tensor})


SCALE = f"{UP}.weight_scale_inv"
UNPLANNABLE = {
    "scale missing": (lambda s: shard_of(s, SCALE).pop(SCALE), rf"{SCALE} is missing"),
    "scale without weight": (
        lambda s: shard_of(s, f"{UP}.weight").pop(f"{UP}.weight"),
        "its weight is missing",
    ),
    "scale beside BF16": (
        retype(f"{UP}.weight", lambda t: t.to(torch.bfloat16)),
        rf"{SCALE} is there but its weight is BF16 \[96, 160\], expected F8_E4M3",
    ),
    "scale of another shape": (
        retype(SCALE, lambda t: t.reshape(2, 1).contiguous()),
        rf"{SCALE} is F32 \[2, 1\], expected F32 \[1, 2\] for a weight F8_E4M3 \[96, 160\]",
    ),
    "scale that would broadcast": (
        retype(SCALE, lambda t: t[:, :1].clone()),
        r"is F32 \[1, 1\], expected F32 \[1, 2\]",
    ),
    "scale that is a scalar": (
        retype(SCALE, lambda t: t[0, 0].clone()),
        r"is F32 \[\], expected F32 \[1, 2\]",
    ),
    "scale in BF16": (
        retype(SCALE, lambda t: t.to(torch.bfloat16)),
        r"is BF16 \[1, 2\], expected F32 \[1, 2\]",
    ),
    "scale too large": (
        retype(SCALE, lambda t: torch.cat([t, t])),
        r"is F32 \[2, 2\], expected F32 \[1, 2\]",
    ),
    "int8 weight": (
        retype(f"{UP}.weight", lambda t: t.view(torch.int8)),
        rf"{UP}\.weight \(I8 \[96, 160\]\) is neither a quantized weight nor",
    ),
    "uint8 weight": (retype(f"{UP}.weight", lambda t: t.view(torch.uint8)), r"\(U8 \[96, 160\]\) is neither"),
    "other FP8": (
        retype(f"{UP}.weight", lambda t: t.float().to(torch.float8_e5m2)),
        r"\(F8_E5M2 \[96, 160\]\) is neither",
    ),
    "FP8 with three dimensions": (
        retype(f"{UP}.weight", lambda t: t.reshape(2, 48, 160)),
        "expected two dimensions",
    ),
    "unknown module": (
        add("model.layers.0.mlp.adapter.weight", torch.zeros(2, dtype=torch.bfloat16)),
        r"model\.layers\.0\.mlp\.adapter\.weight is not a tensor of this family",
    ),
    "unknown parameter": (
        add(f"{UP}.input_scale", torch.ones(1)),
        rf"{UP}\.input_scale \(F32 \[1\]\) is neither",
    ),
}


@pytest.mark.parametrize(("change", "match"), UNPLANNABLE.values(), ids=UNPLANNABLE.keys())
def test_fp8_that_does_not_add_up(fp8_case, tools, tmp_path, change, match):
    tools.edit(fp8_case.source, change)
    refused(fp8_case, tmp_path / "out", match)


def test_every_problem_in_one_message(fp8_case, tools, tmp_path):
    for change in ("scale missing", "unknown module"):
        tools.edit(fp8_case.source, UNPLANNABLE[change][0])
    other = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    tools.edit(fp8_case.source, retype(other, lambda t: t[:1, :1].clone()))
    message = refused(fp8_case, tmp_path / "out", "3 problems")
    for part in (
        f"{SCALE} is missing",
        "adapter.weight is not a tensor",
        f"{other} is F32 [1, 1], expected F32",
    ):
        assert part in message


def test_no_quantization_config(fp8_case, tools, tmp_path):
    tools.edit_config(fp8_case.source, lambda config: config.pop("quantization_config"))
    refused(fp8_case, tmp_path / "out", "no quantization_config, expected one like", CheckpointError)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"fmt": "e5m2"},
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]},
        {"scale_fmt": "e5m3"},
        {"weight_scale_semantics": "sideways"},
    ],
    ids=str,
)
def test_other_quantization_configs(fp8_case, tools, tmp_path, change):
    tools.edit_config(fp8_case.source, lambda config: config["quantization_config"].update(change))
    refused(fp8_case, tmp_path / "out", "config.json: ", FormatError)


def test_nothing_in_fp8(bf16_case, tools, tmp_path):
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    tools.edit_config(bf16_case.source, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(CheckpointError, match="there is nothing to convert"):
        dsv3_tools.convert_fp8_to_bf16(bf16_case.source, tmp_path / "out")


def test_source_that_is_fp8_already(cases, tmp_path):
    with pytest.raises(CheckpointError, match="has a quantization_config, expected an unquantized"):
        dsv3_tools.convert_bf16_to_fp8(cases["fp8-to-bf16"].source, tmp_path / "out")


def test_fp8_weights_without_quantization_config(fp8_case, tools, tmp_path):
    tools.edit_config(fp8_case.source, lambda config: config.pop("quantization_config"))
    with pytest.raises(
        PlanError,
        match=r"_scale_inv \(F32 \[2, 2\]\) is neither a quantized weight nor an unquantized tensor",
    ):
        dsv3_tools.convert_bf16_to_fp8(fp8_case.source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


LIKE_CHANGES = {
    "another shape": (
        retype("model.embed_tokens.weight", lambda t: t[:32].clone()),
        r"model\.embed_tokens\.weight is BF16 \[64, 160\], in .*like it is BF16 \[32, 160\]",
        PlanError,
    ),
    "tensor missing": (lambda s: shard_of(s, NORM).pop(NORM), rf"{NORM} is not in .*like", PlanError),
    "scale missing": (lambda s: shard_of(s, SCALE).pop(SCALE), rf"{SCALE} is missing", PlanError),
    "scale of another shape": (
        retype(SCALE, lambda t: t[:, :1].clone()),
        r"is F32 \[1, 1\], expected F32 \[1, 2\]",
        PlanError,
    ),
}


@pytest.mark.parametrize(("change", "match", "kind"), LIKE_CHANGES.values(), ids=LIKE_CHANGES.keys())
def test_like_that_does_not_fit(cases, tools, tmp_path, change, match, kind):
    own = cases["bf16-to-fp8-like"].with_own_source(tmp_path / "own")
    tools.edit(own.like, change)
    refused(own, tmp_path / "out", match, kind)


def test_like_with_other_scales_than_asked(cases, tmp_path):
    with pytest.raises(UsageError, match=r"--scale-fmt ue8m0: .* has f32 scales"):
        cases["bf16-to-fp8-like"].convert(tmp_path / "out", scale_fmt="ue8m0")
    assert not (tmp_path / "out").exists()


def test_like_with_reciprocal_scales(cases, tools, tmp_path):
    own = cases["bf16-to-fp8-like"].with_own_source(tmp_path / "own")
    change = {"weight_scale_semantics": "inverse"}
    tools.edit_config(own.like, lambda config: config["quantization_config"].update(change))
    refused(own, tmp_path / "out", "reciprocal scales, which --like cannot take over", CheckpointError)


def test_like_that_is_not_fp8(cases, tools, tmp_path):
    own = cases["bf16-to-fp8-like"].with_own_source(tmp_path / "own")
    tools.edit_config(own.like, lambda config: config.pop("quantization_config"))
    refused(own, tmp_path / "out", "no quantization_config", CheckpointError)


# Layouts that are unusual and right.


def test_scales_in_another_shard(fp8_case, tools, tmp_path):
    def change(shards) -> None:
        first, *_, last = shards.values()
        for name in [n for n in first if n.endswith("_scale_inv")]:
            last[name] = first.pop(name)

    tools.edit(fp8_case.source, change)
    tools.convert_quickly(fp8_case, tmp_path / "out")
    found, wanted = tools.snapshot(tmp_path / "out"), fp8_case.expected
    assert [n for n in wanted if n.endswith((".safetensors", tools.index)) and found[n] != wanted[n]] == []


def test_shard_of_scales_has_no_counterpart(fp8_case, tools, tmp_path):
    def change(shards) -> None:
        scales = {}
        for tensors in shards.values():
            scales |= {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
        shards["model-00002-of-000003-scales.safetensors"] = scales

    tools.edit(fp8_case.source, change)
    result = tools.convert_quickly(fp8_case, tmp_path / "out")
    assert result.shards_written == 3
    found, wanted = tools.snapshot(tmp_path / "out"), fp8_case.expected
    assert [n for n in wanted if n.endswith((".safetensors", tools.index)) and found[n] != wanted[n]] == []


def test_single_file(case, tools, tmp_path):
    own = case.with_own_source(tmp_path / "own")

    def change(shards) -> None:
        merged = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
        shards.clear()
        shards["model.safetensors"] = merged

    tools.edit(own.source, change)
    (own.source / tools.index).unlink()
    tools.convert_quickly(own, tmp_path / "out")
    tools.convert_quickly(case, tmp_path / "wanted")
    found, wanted = weights_of(tmp_path / "out"), weights_of(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    same = [
        torch.equal(found[n].reshape(-1).view(torch.uint8), wanted[n].reshape(-1).view(torch.uint8))
        for n in found
    ]
    assert all(same)
    if case.operation not in ("split-mtp", "merge-mtp"):  # cut by size, and with another source's shards
        assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [
            "model-00001-of-000001.safetensors"
        ]
