"""What `quantize` plans: which weights, which names, what config.json says, and for whom the result is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.serving import engine_verdicts
from dsv3_tools.engines import is_ignored
from dsv3_tools.errors import CheckpointError, PlanError, UsageError
from dsv3_tools.quantize.api_int4 import open_quantize_int4
from dsv3_tools.quantize.api_int8 import open_quantize_int8

MTP = 5  # the shipped model's MTP layer


def plan_of(open_it: Any, source: Path, **options: Any) -> tuple[Plan, dict[str, Any]]:
    with open_it(source, **options) as (plan, _, _):
        return plan, json.loads(plan.config)


def formats(plan: Plan) -> dict[str, str]:
    """Returns the format of every weight in the result, by module; "copied" for what is copied."""
    found = {}
    for step in (step for shard in plan.shards for step in shard.steps):
        name = parse_name(next(iter(step.outputs.values())))
        assert name is not None
        found[name.prefix] = step.target.name if step.target else "copied"
    return found


def loading(plan: Plan) -> set[str]:
    return {name for name, verdict in engine_verdicts(plan).items() if verdict.loads}


@pytest.fixture(scope="module")
def bf16(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantization") / "bf16"
    dsv3_tools.convert_fp8_to_bf16(miniature, path, device="cpu")
    return path


def test_int4_takes_routed_experts_alone(miniature: Path) -> None:
    plan, config = plan_of(open_quantize_int4, miniature)
    for module, fmt in formats(plan).items():
        assert (fmt == "int4_packed") == (".mlp.experts." in module), module
    assert config["num_nextn_predict_layers"] == 1
    assert loading(plan) == {"vllm", "sglang", "transformers", "vllm-ascend"}


def test_int8_takes_every_linear_but_four(miniature: Path) -> None:
    plan, _ = plan_of(open_quantize_int8, miniature)
    others = ("kv_b_proj", "mlp.gate", "lm_head", "eh_proj", "embed_tokens", "norm", "head", "layernorm")
    for module, fmt in formats(plan).items():
        assert (fmt == "int8_channel") == (not module.endswith(others)), module
    assert loading(plan) == {"vllm", "sglang", "vllm-ascend"}
    block, config = plan_of(open_quantize_int8, miniature, scheme="block")
    assert loading(block) == {"sglang"}
    ignored = config["quantization_config"]["ignored_layers"]
    assert ignored == [f"model.layers.{layer}.self_attn.kv_b_proj" for layer in range(6)]


LAYOUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "gptq": {"layout": "gptq"},
    "awq": {"layout": "awq"},
    "awq, dense layers too": {"layout": "awq", "include": ("*.mlp.*_proj",)},
    "one layer out, AWQ": {"layout": "awq", "exclude": ("model.layers.2.mlp.experts.*",), "mtp": "keep"},
    "one layer out, GPTQ": {"layout": "gptq", "exclude": ("model.layers.2.mlp.experts.*",), "mtp": "keep"},
    "one layer out": {"exclude": ("model.layers.2.mlp.experts.*",)},
    "MTP out": {"mtp": "keep"},
    "attention of one layer in": {"include": ("model.layers.3.self_attn.o_proj",)},
    "shared experts": {"include": ("*.shared_experts.*",)},
    "rest fp8": {"rest": "fp8"},
    "rest fp8, MTP out": {"rest": "fp8", "mtp": "keep"},
    "all but attention": {"include": ("*_proj",), "exclude": ("*.self_attn.*",)},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_lists_say_what_is_quantized_in_every_engines_reading(
    miniature: Path, options: dict[str, Any]
) -> None:
    """Each engine's own matching, asked about every linear, gives what the plan makes of it."""
    plan, config = plan_of(open_quantize_int4, miniature, **options)
    made = formats(plan)
    quantization = config["quantization_config"]
    for engine in ("vllm", "sglang"):
        for module, fmt in made.items():
            if module.endswith(("_proj", "lm_head")) and "eh_proj" not in module:
                ignored = is_ignored(engine, quantization, module, mtp_layer=MTP)
                assert ignored == (fmt in ("copied", "bf16")), (engine, module, fmt)
        assert engine in loading(plan), engine_verdicts(plan)[engine].failures


def test_control_a_list_without_an_entry_is_noticed(miniature: Path) -> None:
    _, config = plan_of(open_quantize_int4, miniature)
    quantization = config["quantization_config"]
    quantization["ignore"] = [entry for entry in quantization["ignore"] if "self_attn" not in entry]
    assert not is_ignored("vllm", quantization, "model.layers.0.self_attn.o_proj")
    assert is_ignored("vllm", config["quantization_config"], "model.layers.1.mlp.shared_experts.down_proj")


def test_rest_fp8_keeps_the_bytes_of_fp8_weights(miniature: Path, tmp_path: Path) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "out", rest="fp8", device="cpu")
    with dsv3_tools.Checkpoint(miniature) as source, dsv3_tools.Checkpoint(tmp_path / "out") as out:
        name = "model.layers.1.self_attn.o_proj"
        assert out.read_bytes(f"{name}.weight") == source.read_bytes(f"{name}.weight")
        assert out.read_bytes(f"{name}.weight_scale") == source.read_bytes(f"{name}.weight_scale_inv")
        assert out.specs["model.layers.1.self_attn.kv_b_proj.weight"].dtype == "BF16"
        assert f"{name}.weight_scale_inv" not in out.specs


def test_rest_fp8_of_a_bf16_checkpoint_is_quantized(bf16: Path, tmp_path: Path) -> None:
    dsv3_tools.quantize_int4(bf16, tmp_path / "out", rest="fp8", device="cpu")
    found = dsv3_tools.inspect(tmp_path / "out")
    assert found.odd == ()
    assert {name: count.num_weights for name, count in found.formats.items()} == {
        "int4_packed": 240,
        "fp8_block": 42,
    }


def test_dropping_the_mtp_module_changes_weights_and_config_together(miniature: Path, tmp_path: Path) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "out", mtp="drop", device="cpu")
    found = dsv3_tools.inspect(tmp_path / "out")
    assert (found.mtp_layers, found.mtp_tensors, found.odd) == ((), 0, ())
    manifest = json.loads((tmp_path / "out" / "dsv3_manifest.json").read_bytes())
    assert all(name.startswith(f"model.layers.{MTP}.") for name in manifest["dropped"])
    assert len(manifest["dropped"]) == dsv3_tools.inspect(miniature).mtp_tensors
    with pytest.raises(UsageError, match="has no MTP module"):
        plan_of(open_quantize_int4, tmp_path / "out", mtp="drop", layout="gptq")


@pytest.mark.parametrize(
    ("first", "second", "symmetric"),
    [
        ("compressed-tensors", "gptq", True),
        ("gptq", "awq", True),
        ("gptq", "compressed-tensors", True),
        ("awq", "gptq", True),
        ("awq", "compressed-tensors", True),
        ("compressed-tensors", "awq", False),
        ("awq", "compressed-tensors", False),
    ],
)
def test_codes_are_moved_between_layouts(
    miniature: Path, tmp_path: Path, first: str, second: str, symmetric: bool
) -> None:
    """INT4 to INT4 of the same groups gives the bytes that the other layout's own quantization gives."""
    options: dict[str, Any] = {"group_size": 32, "symmetric": symmetric, "device": "cpu"}
    dsv3_tools.quantize_int4(miniature, tmp_path / "a", layout=first, **options)
    dsv3_tools.quantize_int4(tmp_path / "a", tmp_path / "b", layout=second, **options)
    dsv3_tools.quantize_int4(miniature, tmp_path / "direct", layout=second, **options)
    for path in sorted((tmp_path / "direct").glob("*.safetensors")):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("layout", ["compressed-tensors", "awq"])
def test_codes_without_zero_points_are_moved_to_layouts_with(
    miniature: Path, tmp_path: Path, layout: str
) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "a", device="cpu")
    dsv3_tools.quantize_int4(tmp_path / "a", tmp_path / "b", symmetric=False, layout=layout, device="cpu")
    for name in ("a", "b"):
        dsv3_tools.convert_int4_to_bf16(tmp_path / name, tmp_path / f"{name}-bf16", device="cpu")
    for path in sorted((tmp_path / "a-bf16").glob("*.safetensors")):
        assert (tmp_path / "b-bf16" / path.name).read_bytes() == path.read_bytes()


def test_what_is_quantized_already_is_copied(miniature: Path, tmp_path: Path) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "a", mtp="keep", device="cpu")
    dsv3_tools.quantize_int4(tmp_path / "a", tmp_path / "b", device="cpu")
    with dsv3_tools.Checkpoint(tmp_path / "a") as a, dsv3_tools.Checkpoint(tmp_path / "b") as b:
        name = "model.layers.1.mlp.experts.0.up_proj.weight_packed"
        assert a.read_bytes(name) == b.read_bytes(name)
        assert f"model.layers.{MTP}.mlp.experts.0.up_proj.weight_packed" in b.specs
    with pytest.raises(CheckpointError, match="nothing is to be changed"):
        plan_of(open_quantize_int4, tmp_path / "b")


def test_bf16_and_fp8_sources_agree_where_they_must(miniature: Path, bf16: Path, tmp_path: Path) -> None:
    """From FP8 the float32 product is quantized, from BF16 its rounding: nearly all codes are the same."""
    for name, source in (("fp8", miniature), ("bf16", bf16)):
        dsv3_tools.quantize_int4(source, tmp_path / name, device="cpu")
    same = total = 0
    for path in sorted((tmp_path / "fp8").glob("*.safetensors")):
        a, b = load_file(path), load_file(tmp_path / "bf16" / path.name)
        for key in a:
            if key.endswith("weight_packed"):
                x, y = a[key].view(torch.uint8), b[key].view(torch.uint8)
                same += int((x == y).sum())
                total += x.numel()
            elif not key.endswith("weight_scale"):
                assert torch.equal(a[key], b[key]), key
    assert 0.9 < same / total < 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown pattern": ({"include": ("model.layers.99.*",)}, "fits no linear that can be quantized"),
    "router": ({"include": ("*.mlp.gate",)}, "fits no linear that can be quantized"),
    "half of a pair": ({"include": ("*.self_attn.q_a_proj",)}, "engines load .* of a layer as one"),
    "one expert": ({"exclude": ("model.layers.2.mlp.experts.7.*",)}, "engines load .* as one"),
    "group of 16": ({"group_size": 16}, "group_size: got 16"),
    "zero points in GPTQ": ({"layout": "gptq", "symmetric": False}, "--asymmetric"),
    "FP8 beside AWQ": ({"layout": "awq", "rest": "fp8"}, "--rest fp8"),
    "W4A8 of 64": ({"activations": "fp8", "group_size": 64}, "--activations fp8"),
    "scale search": ({"scale_search": "best"}, "scale_search: got 'best'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options(miniature: Path, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        plan_of(open_quantize_int4, miniature, **options)


def test_a_weight_that_does_not_divide_into_groups_is_named(tools: Any, tmp_path: Path) -> None:
    source = tools.make(tmp_path / "source", overrides={"hidden_size": 144})
    with pytest.raises(PlanError, match=r"experts\.0\.gate_proj\.weight: int4_packed: .* multiples of 32"):
        plan_of(open_quantize_int4, source, group_size=32)


def test_activations_change_the_config_alone(miniature: Path) -> None:
    plain, before = plan_of(open_quantize_int4, miniature)
    w4a8, after = plan_of(open_quantize_int4, miniature, activations="fp8")
    assert [shard.header_sha256 for shard in plain.shards] == [shard.header_sha256 for shard in w4a8.shards]
    group = after["quantization_config"]["config_groups"]["group_0"]
    assert (group["input_activations"]["num_bits"], group["input_activations"]["type"]) == (8, "float")
    group["input_activations"] = None
    assert before == after


@pytest.mark.parametrize(
    ("open_it", "options", "nbytes"),
    [
        (open_quantize_int4, {}, 381_599_341_568),
        # 665,183,059,968 weights of experts, whose scales of 2 bytes are four times as many.
        (open_quantize_int4, {"group_size": 32}, 381_599_341_568 + 665_183_059_968 * 2 * 3 // 128),
        (open_quantize_int8, {}, None),
    ],
)
def test_deepseek_v3(v3: Path, open_it: Any, options: dict[str, Any], nbytes: int | None) -> None:
    """Sizes from the shapes alone; every engine that should, would load it on eight GPUs."""
    plan, _ = plan_of(open_it, v3, **options)
    if nbytes is not None:
        assert plan.payload_nbytes == nbytes
    else:
        assert plan.payload_nbytes == pytest.approx(690.1e9, rel=1e-3)
    assert {"vllm", "sglang", "vllm-ascend"} <= loading(plan)


def test_codes_with_float16_scales_are_moved_too(miniature: Path, tmp_path: Path) -> None:
    """Other tools' GPTQ has F16 scales: they stay, so that no weight changes."""
    dsv3_tools.quantize_int4(miniature, tmp_path / "a", layout="gptq", device="cpu")
    for path in (tmp_path / "a").glob("*.safetensors"):
        tensors = load_file(path)
        halved = {n: t.to(torch.float16) if n.endswith(".scales") else t for n, t in tensors.items()}
        save_file(halved, path, metadata={"format": "pt"})
    dsv3_tools.quantize_int4(tmp_path / "a", tmp_path / "b", device="cpu")
    dsv3_tools.convert_int4_to_bf16(tmp_path / "a", tmp_path / "a-bf16", device="cpu")
    dsv3_tools.convert_int4_to_bf16(tmp_path / "b", tmp_path / "b-bf16", device="cpu")
    for path in sorted((tmp_path / "a-bf16").glob("*.safetensors")):
        found, expected = load_file(tmp_path / "b-bf16" / path.name), load_file(path)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
