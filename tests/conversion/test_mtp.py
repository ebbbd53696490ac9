"""Splitting off an MTP module and merging it again: names, bytes, config, and what does not belong together.

The expectations are made with safetensors' own loader and by hand, not with this program's names or plans.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools
from dsv3_tools import merge_mtp, split_mtp
from dsv3_tools.conversion.api_mtp import open_merge_mtp, open_split_mtp
from dsv3_tools.errors import CheckpointError, DestinationError, Dsv3Error, PlanError, UsageError

INDEX = "model.safetensors.index.json"
MANIFEST = "dsv3_manifest.json"
MTP = "model.layers.2."
SHARED = ("embed_tokens.weight", "shared_head.head.weight")
HOW: dict[str, Any] = {"device": "cpu", "workers": 2}

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("", {}),
    "bf16": ("convert_fp8_to_bf16", {}),
    "int8": ("quantize_int8", {}),
    "int8-block": ("quantize_int8", {"scheme": "block"}),
    "int8-mtp-bf16": ("quantize_int8", {"mtp": "keep"}),
    "int4": ("quantize_int4", {"group_size": 32}),
    "int4-asymmetric": ("quantize_int4", {"group_size": 32, "symmetric": False}),
    "int4-mtp-bf16": ("quantize_int4", {"group_size": 32, "mtp": "keep"}),
    "int4-and-fp8": ("quantize_int4", {"group_size": 32, "rest": "fp8"}),
    "gptq": ("quantize_int4", {"group_size": 32, "layout": "gptq"}),
    "gptq-mtp-bf16": ("quantize_int4", {"group_size": 32, "layout": "gptq", "mtp": "keep"}),
    "awq": ("quantize_int4", {"group_size": 32, "layout": "awq"}),
    "awq-mtp-bf16": ("quantize_int4", {"group_size": 32, "layout": "awq", "mtp": "keep"}),
}
"""What is made of the FP8 checkpoint; with "mtp-bf16" its MTP module is not quantized."""


DIMS = {
    "num_nextn_predict_layers": 1,
    "hidden_size": 256,
    "intermediate_size": 256,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
"""Large enough for the blocks and groups of every engine; `kv_a_proj_with_mqa` has a partial block."""


@pytest.fixture(scope="module")
def sources(tools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of two layers and an MTP layer, in every format; must not be written to."""
    root = tmp_path_factory.mktemp("mtp")
    fp8 = tools.make(root / "fp8", shards=4, overrides=DIMS)
    tools.edit(fp8, _scatter_scales)
    made = {"fp8": fp8}
    for name, (function, options) in FORMATS.items():
        if function:
            getattr(dsv3_tools, function)(fp8, root / name, **HOW, **options)
        made[name] = root / name
    return made


def _scatter_scales(shards: dict[str, dict[str, torch.Tensor]]) -> None:
    """Puts a scale of either half into another shard than its codes, as released checkpoints have some."""
    first, *_, last = shards.values()
    for layer in ("model.layers.0.", MTP):
        name = f"{layer}self_attn.o_proj.weight_scale_inv"
        holder = next(tensors for tensors in shards.values() if name in tensors)
        (first if holder is last else last)[name] = holder.pop(name)


@pytest.fixture
def source(request: pytest.FixtureRequest, sources: dict[str, Path]) -> Path:
    return sources[request.param]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert sum(map(len, found)) == len({name for part in found for name in part})
    return {name: tensor for part in found for name, tensor in part.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """Returns how two sets of tensors differ, dtype, shape and bits."""
    if ours.keys() != theirs.keys():
        return f"names: {sorted(ours.keys() ^ theirs.keys())[:5]}"
    for name, tensor in ours.items():
        other = theirs[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return f"{name}: {tensor.dtype} {tensor.shape}, {other.dtype} {other.shape}"
        if not torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            return f"{name}: other bytes"
    return ""


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Returns every file but manifest and card, which say how it was made, and what no conversion copies."""
    others = (MANIFEST, "README.md", "optimizer.bin")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in others}


def loading(folder: Path) -> set[str]:
    return {name for name, verdict in dsv3_tools.check(folder).verdicts.items() if verdict.loads}


def halves(source: Path, folder: Path, **options: Any) -> tuple[Path, Path]:
    split_mtp(source, main=folder / "main", mtp=folder / "mtp", **HOW, **options)
    return folder / "main", folder / "mtp"


# Splitting.


@pytest.mark.parametrize("source", FORMATS, indirect=True)
def test_main_is_the_source_without_the_module(source: Path, tmp_path: Path) -> None:
    split_mtp(source, main=tmp_path / "main", **HOW)
    whole = tensors(source)
    expected = {name: tensor for name, tensor in whole.items() if not name.startswith(MTP)}
    assert len(expected) < len(whole)
    assert not same(tensors(tmp_path / "main"), expected)
    found, before = config(tmp_path / "main"), config(source)
    assert list(found) == list(before)
    assert found["num_nextn_predict_layers"] == 0
    assert {k: v for k, v in found.items() if v != before[k]}.keys() <= {
        "num_nextn_predict_layers",
        "quantization_config",
    }
    assert not re.search(r"eh_proj|shared_head|decoder|layers\.2", json.dumps(found))
    assert loading(tmp_path / "main") == loading(source)
    assert dsv3_tools.verify_structure(tmp_path / "main").passed
    index = json.loads((tmp_path / "main" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


@pytest.mark.parametrize("source", FORMATS, indirect=True)
def test_the_native_module_keeps_names_and_config(source: Path, tmp_path: Path) -> None:
    split_mtp(source, mtp=tmp_path / "mtp", **HOW)
    expected = {name: tensor for name, tensor in tensors(source).items() if name.startswith(MTP)}
    assert not same(tensors(tmp_path / "mtp"), expected)
    before = config(source)
    if source.name.endswith("mtp-bf16"):  # nothing is quantized in it
        del before["quantization_config"]
        assert config(tmp_path / "mtp") == before
    else:
        assert (tmp_path / "mtp" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    drafting = {"vllm", "lmdeploy", "vllm-ascend"} & loading(source)
    assert loading(tmp_path / "mtp") >= drafting
    assert dsv3_tools.verify_structure(tmp_path / "mtp").passed


def test_drop_shared_leaves_two_tensors_out(sources: dict[str, Path], tmp_path: Path) -> None:
    split_mtp(sources["fp8"], mtp=tmp_path / "mtp", drop_shared=True, **HOW)
    own = {n: t for n, t in tensors(sources["fp8"]).items() if n.startswith(MTP) and not n.endswith(SHARED)}
    assert not same(tensors(tmp_path / "mtp"), own)
    dropped = json.loads((tmp_path / "mtp" / MANIFEST).read_text())["dropped"]
    assert {n for n, why in dropped.items() if "merge-mtp" in why} == {MTP + n for n in SHARED}


# What SGLang's `scripts/export_deepseek_nextn.py` writes of a DeepSeek-V3 with two routed experts.
PARTS = ("weight", "weight_scale_inv")
LINEARS = (
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
    *(f"mlp.experts.{e}.{p}_proj" for e in (0, 1) for p in ("gate", "up", "down")),
    *(f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")),
)
PLAIN = (
    "eh_proj.weight",
    "enorm.weight",
    "hnorm.weight",
    "input_layernorm.weight",
    "mlp.gate.e_score_correction_bias",
    "mlp.gate.weight",
    "post_attention_layernorm.weight",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.q_a_layernorm.weight",
    "shared_head.norm.weight",
)


def test_nextn_has_the_names_dtypes_and_config_of_sglangs_export(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    split_mtp(sources["fp8"], mtp=tmp_path / "nextn", layout="sglang-nextn", **HOW)
    found = tensors(tmp_path / "nextn")
    names = {f"model.layers.0.{linear}.{part}" for linear in LINEARS for part in PARTS}
    assert found.keys() == names | {f"model.layers.0.{name}" for name in PLAIN}
    floats = {".weight_scale_inv": torch.float32, "correction_bias": torch.float32}
    for name, tensor in found.items():
        linear = name.removeprefix("model.layers.0.").removesuffix(".weight") in LINEARS
        other = next((dtype for end, dtype in floats.items() if name.endswith(end)), torch.bfloat16)
        assert tensor.dtype == (torch.float8_e4m3fn if linear else other), name
    own = {n: t for n, t in tensors(sources["fp8"]).items() if n.startswith(MTP) and not n.endswith(SHARED)}
    assert not same(found, {n.replace(MTP, "model.layers.0."): tensor for n, tensor in own.items()})
    expected = config(sources["fp8"])
    expected |= {"num_hidden_layers": 1, "architectures": ["DeepseekV3ForCausalLMNextN"]}
    assert config(tmp_path / "nextn") == expected
    assert (tmp_path / "nextn" / "tokenizer.json").exists()


@pytest.mark.parametrize("source", FORMATS, indirect=True)
def test_nextn_in_every_format(source: Path, tmp_path: Path) -> None:
    split_mtp(source, mtp=tmp_path / "nextn", layout="sglang-nextn", **HOW)
    own = {n: t for n, t in tensors(source).items() if n.startswith(MTP) and not n.endswith(SHARED)}
    expected = {n.replace(MTP, "model.layers.0."): tensor for n, tensor in own.items()}
    assert not same(tensors(tmp_path / "nextn"), expected)
    plain = source.name in ("fp8", "bf16") or source.name.endswith("mtp-bf16")
    assert loading(tmp_path / "nextn") == {"sglang"} & loading(source) | ({"lightllm"} if plain else set())
    assert not re.search(r"layers\\*\.\(?2", json.dumps(config(tmp_path / "nextn")))
    assert dsv3_tools.verify_structure(tmp_path / "nextn").passed


def test_negative_control_same_notices(sources: dict[str, Path]) -> None:
    whole = tensors(sources["bf16"])
    name = MTP + "eh_proj.weight"
    flipped = whole[name].clone()
    flipped.view(torch.uint8)[0, 0] ^= 1
    assert "other bytes" in same(whole, {**whole, name: flipped})
    assert "names" in same(whole, {n: t for n, t in whole.items() if n != name})
    assert "float32" in same(whole, {**whole, name: whole[name].float()})


def test_main_loads_in_transformers_without_an_unexpected_key(miniature: Path, tmp_path: Path) -> None:
    from transformers import DeepseekV3ForCausalLM

    dsv3_tools.convert_fp8_to_bf16(miniature, tmp_path / "bf16", **HOW)
    split_mtp(tmp_path / "bf16", main=tmp_path / "main", **HOW)
    for folder, unexpected in (("main", False), ("bf16", True)):  # the whole model is the control
        _, found = DeepseekV3ForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["mismatched_keys"]
        assert bool(found["unexpected_keys"]) is unexpected


def test_deepseek_v3(v3: Path, tmp_path: Path) -> None:
    """The figures are those of the release: sums over its published shapes."""
    began = time.process_time()
    opened = open_split_mtp(v3, main=tmp_path / "main", mtp=tmp_path / "mtp")
    with opened as (parts, _):
        found = {half: (p.plan.num_tensors_out, p.plan.payload_nbytes) for half, p in parts.items()}
    assert found == {"main": (90_427, 673_150_611_808), "mtp": (1_564, 15_424_227_552)}
    assert time.process_time() - began < 20
    with open_split_mtp(v3, mtp=tmp_path / "mtp", layout="sglang-nextn") as (parts, _):
        assert parts["mtp"].plan.num_tensors_out == 1_562


# There and back.


@pytest.mark.parametrize("options", [{}, {"drop_shared": True}, {"layout": "sglang-nextn"}], ids=str)
@pytest.mark.parametrize("source", FORMATS, indirect=True)
def test_split_then_merge_gives_back_every_file(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    main, mtp = halves(source, tmp_path, **options)
    merge_mtp(main, mtp, tmp_path / "whole", **HOW)
    ours, theirs = files(tmp_path / "whole"), files(source)
    assert ours.keys() == theirs.keys()
    metadata = json.loads(theirs[INDEX])["metadata"]
    if "total_size" not in metadata or source.name == "fp8":  # test tools write an index without sizes
        assert json.loads(ours.pop(INDEX))["weight_map"] == json.loads(theirs.pop(INDEX))["weight_map"]
        ours.pop("config.json"), theirs.pop("config.json")
        assert config(tmp_path / "whole") == config(source)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert loading(tmp_path / "whole") == loading(source)


def test_the_shipped_model_comes_back_byte_for_byte(miniature: Path, tmp_path: Path) -> None:
    """Its index is another tool's, and some of its scales are in another shard than their codes."""
    for layout in ("native", "sglang-nextn"):
        main, mtp = halves(miniature, tmp_path / layout, layout=layout)
        merge_mtp(main, mtp, tmp_path / layout / "whole", **HOW)
        assert files(tmp_path / layout / "whole") == files(miniature)


@pytest.mark.parametrize("source", ["fp8", "int4", "gptq-mtp-bf16"], indirect=True)
def test_without_manifests_the_module_follows_the_model(source: Path, tmp_path: Path) -> None:
    main, mtp = halves(source, tmp_path, layout="sglang-nextn")
    with open_merge_mtp(main, mtp) as (plan, _):
        assert plan.notes == ()
    (main / MANIFEST).unlink()
    with open_merge_mtp(main, mtp) as (plan, _):
        assert "by which to tell whether it is this model's" in plan.notes[0]
    merge_mtp(main, mtp, tmp_path / "whole", **HOW)
    assert not same(tensors(tmp_path / "whole"), tensors(source))
    weight_map = json.loads((tmp_path / "whole" / INDEX).read_text())["weight_map"]
    module = {shard for name, shard in weight_map.items() if name.startswith(MTP)}
    assert min(module) > max(shard for name, shard in weight_map.items() if not name.startswith(MTP))
    assert config(tmp_path / "whole").keys() == config(source).keys()
    assert loading(tmp_path / "whole") == loading(source)


@pytest.mark.parametrize("source", ["fp8", "int4"], indirect=True)
def test_other_shard_sizes(source: Path, tmp_path: Path) -> None:
    main, mtp = halves(source, tmp_path, max_shard_size=60_000)
    assert len(list(main.glob("*.safetensors"))) > 4
    merge_mtp(main, mtp, tmp_path / "whole", max_shard_size=90_000, **HOW)
    assert not same(tensors(tmp_path / "whole"), tensors(source))
    for folder in (main, mtp, tmp_path / "whole"):
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        for name, shard in weight_map.items():
            assert weight_map.get(name.removesuffix("_scale_inv"), shard) == shard


def test_several_mtp_layers(tools, tmp_path: Path) -> None:
    """Layer numbers are counted from num_hidden_layers, not 61, and there may be any number of them."""
    whole = tools.make(tmp_path / "src", layers=3, shards=5, overrides={"num_nextn_predict_layers": 3})
    main, mtp = halves(whole, tmp_path)
    layers = {int(name.split(".")[2]) for name in tensors(mtp)}
    assert layers == {3, 4, 5}
    assert dsv3_tools.inspect(main).mtp is None
    merge_mtp(main, mtp, tmp_path / "whole", **HOW)
    assert files(tmp_path / "whole") == files(whole)
    with pytest.raises(UsageError, match="holds one MTP layer"):
        split_mtp(whole, mtp=tmp_path / "nextn", layout="sglang-nextn", **HOW)


# Halves of different formats.


@pytest.fixture(scope="module")
def parts(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The main model and the module, each converted by itself after the split."""
    root = tmp_path_factory.mktemp("parts")
    main, mtp = halves(sources["fp8"], root)
    made = {"main fp8": main, "mtp fp8": mtp}
    kinds = ("bf16", "int8", "int8-block", "int4", "gptq", "awq", "int4-and-fp8")
    for half, source in (("main", main), ("mtp", mtp)):
        for name in kinds:
            function, options = FORMATS[name]
            made[f"{half} {name}"] = root / f"{half}-{name}"
            how = HOW | options | {"partial": half == "mtp"}
            getattr(dsv3_tools, function)(source, root / f"{half}-{name}", **how)
    return made


KINDS = ("fp8", "bf16", "int8", "int8-block", "int4", "gptq", "awq", "int4-and-fp8")
BELONG = {(kind, kind) for kind in KINDS} | {(kind, "bf16") for kind in KINDS if kind != "int8-block"}
BELONG |= {("int4-and-fp8", "int4")}


@pytest.mark.parametrize("mtp", KINDS)
@pytest.mark.parametrize("main", KINDS)
def test_formats_that_one_config_can_describe(
    parts: dict[str, Path], sources: dict[str, Path], tmp_path: Path, main: str, mtp: str
) -> None:
    ours, theirs = parts[f"main {main}"], parts[f"mtp {mtp}"]
    if (main, mtp) not in BELONG:
        with pytest.raises(PlanError, match=r"cannot describe both|has no rule for that"):
            merge_mtp(ours, theirs, tmp_path / "whole", **HOW)
        assert not (tmp_path / "whole").exists()
        return
    merge_mtp(ours, theirs, tmp_path / "whole", **HOW)
    assert not same(tensors(tmp_path / "whole"), tensors(ours) | tensors(theirs))
    assert dsv3_tools.verify_structure(tmp_path / "whole").passed
    # These three want every kv_b_proj in FP8, in a draft as well.
    exempt = {"lmdeploy", "tensorrt-llm", "lightllm"} if (main, mtp) == ("fp8", "bf16") else set()
    assert loading(tmp_path / "whole") == loading(ours) - exempt


def test_rules_for_an_unquantized_module_are_those_of_quantize(
    sources: dict[str, Path], parts: dict[str, Path], tmp_path: Path
) -> None:
    """The same list, but for its order, as `quantize int4 --mtp keep` writes for the whole model."""
    merge_mtp(parts["main int4"], parts["mtp bf16"], tmp_path / "whole", **HOW)
    ours, theirs = (config(p)["quantization_config"] for p in (tmp_path / "whole", sources["int4-mtp-bf16"]))
    assert sorted(ours.pop("ignore")) == sorted(theirs.pop("ignore"))
    assert ours == theirs
    whole, expected = tensors(tmp_path / "whole"), tensors(sources["int4-mtp-bf16"])
    assert not same(whole, expected)


def test_negative_control_without_the_rules_engines_refuse(
    parts: dict[str, Path], tools, tmp_path: Path
) -> None:
    merge_mtp(parts["main int4"], parts["mtp bf16"], tmp_path / "whole", **HOW)
    main = config(parts["main int4"])["quantization_config"]
    tools.edit_config(tmp_path / "whole", lambda edited: edited.update(quantization_config=main))
    assert not {"vllm", "sglang"} & loading(tmp_path / "whole")


def test_merging_from_a_whole_checkpoint(
    sources: dict[str, Path], parts: dict[str, Path], tmp_path: Path
) -> None:
    """A model that has lost its module gets it from the release."""
    merge_mtp(parts["main fp8"], sources["fp8"], tmp_path / "whole", **HOW)
    assert not same(tensors(tmp_path / "whole"), tensors(sources["fp8"]))
    assert config(tmp_path / "whole") == config(sources["fp8"])


# What does not belong together.


def retune(tools, folder: Path, name: str) -> None:
    tools.poke(folder, name, 5, b"\x12\x3f")


def test_another_releases_module_is_refused_with_the_evidence(
    tools, sources: dict[str, Path], tmp_path: Path
) -> None:
    main, mtp = halves(sources["fp8"], tmp_path)
    retune(tools, main, "model.embed_tokens.weight")
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.embed_tokens\.weight is not model\.embed"
    ) as caught:
        merge_mtp(main, mtp, tmp_path / "whole", **HOW)
    assert "1 of 16,384 elements differ, the first at [0, 5]" in str(caught.value)
    assert not list((tmp_path / "whole").glob("*.safetensors"))
    merge_mtp(main, mtp, tmp_path / "whole", allow_different_shared=True, **HOW)
    assert not same(tensors(tmp_path / "whole"), tensors(main) | tensors(mtp))


@pytest.mark.parametrize("options", [{}, {"drop_shared": True}, {"layout": "sglang-nextn"}], ids=str)
def test_a_split_checks_what_is_shared(
    tools, sources: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    source = tools.copy(sources["fp8"], tmp_path / "source")
    retune(tools, source, "lm_head.weight")
    with pytest.raises(CheckpointError, match=r"shared_head\.head\.weight is not lm_head\.weight"):
        halves(source, tmp_path, **options)
    assert not list((tmp_path / "mtp").glob("*.safetensors"))
    split_mtp(source, mtp=tmp_path / "other", allow_different_shared=True, **options, **HOW)
    split_mtp(source, main=tmp_path / "alone", **HOW)  # nothing of the module is kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_routed_experts": 4}, "n_routed_experts is 2, that of the MTP module"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2, the MTP module in .* is for 3 layers"),
        ({"rope_theta": 1.5}, "rope_theta is 10000, that of the MTP module in .* is 1.5"),
        ({"v_head_dim": 16}, "v_head_dim is 64, that of the MTP module"),
    ],
    ids=str,
)
def test_other_dimensions_are_refused(
    tools, sources: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    main, mtp = halves(sources["bf16"], tmp_path)
    tools.edit_config(mtp, lambda edited: edited.update(change))
    with pytest.raises(
        Dsv3Error, match=message if "num_hidden_layers" not in change else "no weights of an MTP"
    ):
        merge_mtp(main, mtp, tmp_path / "whole", **HOW)
    assert not (tmp_path / "whole").exists()


def test_what_is_no_half_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    main, mtp = halves(sources["fp8"], tmp_path)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: merge_mtp(sources["fp8"], mtp, tmp_path / "out"), "has an MTP module already"),
        (lambda: merge_mtp(main, main, tmp_path / "out"), "is given both as"),
        (lambda: merge_mtp(main, tmp_path / "none", tmp_path / "out"), "does not exist"),
        (lambda: merge_mtp(main, mtp, main), "are the same directory"),
        (lambda: merge_mtp(main, mtp, mtp / "sub"), "lies in the other"),
        (lambda: split_mtp(main, main=tmp_path / "out"), "has no MTP module"),
        (lambda: split_mtp(mtp, mtp=tmp_path / "out"), "holds an MTP module alone"),
        (lambda: split_mtp(sources["fp8"]), "neither --main nor --mtp"),
        (lambda: split_mtp(sources["fp8"], mtp=tmp_path / "out", layout="x"), "expected one of native"),
    ]
    for act, message in refused:
        with pytest.raises(Dsv3Error, match=message):
            act()
    assert not (tmp_path / "out").exists()


def test_weights_and_config_that_disagree_are_refused(
    tools, sources: dict[str, Path], tmp_path: Path
) -> None:
    uncounted = tools.copy(sources["fp8"], tmp_path / "uncounted")
    tools.edit_config(uncounted, lambda edited: edited.update(num_nextn_predict_layers=0))
    with pytest.raises(
        CheckpointError, match=r"num_nextn_predict_layers 0 leave out .* tensors of later layers"
    ):
        split_mtp(uncounted, main=tmp_path / "out", **HOW)
    main, _ = halves(sources["fp8"], tmp_path)
    tools.edit_config(main, lambda edited: edited.update(num_nextn_predict_layers=1))
    with pytest.raises(
        CheckpointError, match="says num_nextn_predict_layers 1, but the weights of the MTP module"
    ):
        split_mtp(main, main=tmp_path / "out", **HOW)
    merge_mtp(main, tmp_path / "mtp", tmp_path / "whole", **HOW)  # which is how to mend it
    assert config(tmp_path / "whole")["num_nextn_predict_layers"] == 1


def test_a_module_with_a_tensor_missing_is_refused(tools, sources: dict[str, Path], tmp_path: Path) -> None:
    main, mtp = halves(sources["fp8"], tmp_path)
    tools.edit(mtp, lambda shards: [part.pop(MTP + "eh_proj.weight", None) for part in shards.values()])
    with pytest.raises(PlanError, match=r"missing: model\.layers\.2\.eh_proj\.weight"):
        merge_mtp(main, mtp, tmp_path / "whole", **HOW)


# Both results of one command.


def test_nothing_is_written_if_one_of_two_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mtp").mkdir()
    (tmp_path / "mtp" / "notes.txt").write_text("mine")
    with pytest.raises(DestinationError, match="is not empty"):
        halves(sources["fp8"], tmp_path)
    assert not (tmp_path / "main").exists()
    for one, other in (("x", "x"), ("x", "x/y"), ("x/y", "x")):
        with pytest.raises(UsageError, match="lies in the other"):
            split_mtp(sources["fp8"], main=tmp_path / one, mtp=tmp_path / other, **HOW)
    assert not (tmp_path / "x").exists()


def test_room_is_needed_for_both(sources: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    from dsv3_tools.conversion import preflight, preview

    sizes = [
        getattr(split_mtp(sources["fp8"], **{half: tmp_path / f"{half}-alone"}, **HOW), half).nbytes_out
        for half in ("main", "mtp")
    ]
    for module in (preview, preflight):
        monkeypatch.setattr(module, "free_nbytes", lambda _: sum(sizes) - 1)
    with pytest.raises(DestinationError, match=f"the runs of this command need {sum(sizes):,}, 1 more"):
        halves(sources["fp8"], tmp_path)
    assert not (tmp_path / "main").exists()
    for module in (preview, preflight):
        monkeypatch.setattr(module, "free_nbytes", lambda _: sum(sizes))
    halves(sources["fp8"], tmp_path)


def test_a_finished_half_is_left_alone_when_the_other_goes_on(tools, cases, tmp_path: Path) -> None:
    case = cases["split-mtp"]
    both = replace(case, output="mtp", options={})
    first = split_mtp(both.source, main=tmp_path / "main", **HOW)
    assert first.mtp is None
    result = split_mtp(both.source, main=tmp_path / "main", mtp=tmp_path / "mtp", **HOW)
    assert result.main is not None
    assert result.mtp is not None
    assert (result.main.already_complete, result.mtp.already_complete) == (True, False)


def test_the_manifest_has_both_sources(sources: dict[str, Path], tmp_path: Path) -> None:
    main, mtp = halves(sources["fp8"], tmp_path)
    merge_mtp(main, mtp, tmp_path / "whole", **HOW)
    manifest = json.loads((tmp_path / "whole" / MANIFEST).read_text())
    for origin, folder in (("source", main), ("mtp", mtp)):
        names = {f["name"] for f in manifest["sources"] if f["origin"] == origin}
        assert names >= {path.name for path in folder.glob("*.safetensors")}
    assert dsv3_tools.verify_integrity(tmp_path / "whole").passed


# What `inspect` says.


def test_inspect_says_what_the_module_is(sources: dict[str, Path], tools, tmp_path: Path) -> None:
    main, mtp = halves(sources["fp8"], tmp_path)
    split_mtp(sources["fp8"], mtp=tmp_path / "nextn", layout="sglang-nextn", **HOW)
    whole, alone, nextn = (dsv3_tools.inspect(p) for p in (sources["fp8"], mtp, tmp_path / "nextn"))
    assert dsv3_tools.inspect(main).mtp is None
    for found in (whole, alone, nextn):
        assert found.mtp is not None
        assert found.mtp.agrees
    assert whole.mtp is not None
    assert alone.mtp is not None
    assert nextn.mtp is not None
    assert (whole.mtp.alone, alone.mtp.alone, nextn.mtp.alone) == (False, True, True)
    assert (whole.mtp.layers, alone.mtp.layers, nextn.mtp.layers) == ((2,), (2,), (0,))
    assert (alone.mtp.layout, nextn.mtp.layout) == ("native", "sglang-nextn")
    assert whole.mtp.shared == alone.mtp.shared == ("embed_tokens", "shared_head.head")
    assert nextn.mtp.shared == ()
    own = [tensor for name, tensor in tensors(sources["fp8"]).items() if name.startswith(MTP)]
    assert (whole.mtp.num_tensors, whole.mtp.nbytes) == (len(own), sum(tensor.nbytes for tensor in own))
    assert whole.mtp.formats["fp8_block"].num_weights == len(LINEARS)
    assert not [line for line in (*alone.odd, *nextn.odd) if "missing" in line or "belong" in line]


def test_inspect_says_when_weights_and_config_disagree(
    sources: dict[str, Path], tools, tmp_path: Path
) -> None:
    uncounted = tools.copy(sources["fp8"], tmp_path / "uncounted")
    tools.edit_config(uncounted, lambda edited: edited.update(num_nextn_predict_layers=0))
    found = dsv3_tools.inspect(uncounted)
    assert found.mtp is not None
    assert not found.mtp.agrees
    assert any("do not belong to the model" in line for line in found.odd)
    main, _ = halves(sources["fp8"], tmp_path)
    tools.edit_config(main, lambda edited: edited.update(num_nextn_predict_layers=1))
    assert any("MTP module's weights are missing" in line for line in dsv3_tools.inspect(main).odd)


def save_whole(folder: Path, made: dict[str, torch.Tensor]) -> None:
    """Writes one file without an index, as small models have it."""
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_source_of_one_file(sources: dict[str, Path], tools, tmp_path: Path) -> None:
    source = tools.copy(sources["fp8"], tmp_path / "source")
    save_whole(source, tensors(source))
    main, mtp = halves(source, tmp_path)
    merge_mtp(main, mtp, tmp_path / "whole", **HOW)
    assert not same(tensors(tmp_path / "whole"), tensors(source))
