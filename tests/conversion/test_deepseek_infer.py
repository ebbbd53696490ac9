"""The shards for DeepSeek's inference demo: those of its own converter, which a plain port here stands for.

The port was written from what the demo's `inference/convert.py` and `inference/model.py` are known to do,
with nothing of the package: it holds all ranks in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.deepseek_infer import plan_to_deepseek_infer
from dsv3_tools.conversion.deepseek_infer_config import model_args, unlike_demo
from dsv3_tools.errors import CheckpointError, DestinationError, FormatError, PlanError, UsageError
from dsv3_tools.formats import INT4Packed, INT8Block, INT8Channel, compressed_tensors

CONFIG = "deepseek_infer_config.json"
MANIFEST = "dsv3_manifest.json"

# Blocks are cut between them for four ranks, and there are partial blocks along the sides that are not cut.
FP8: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_shared_experts": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 128,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
BF16 = FP8 | {
    "intermediate_size": 20,
    "moe_intermediate_size": 6,
    "q_lora_rank": None,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 3,
}

# inference/configs/config_671B.json
RELEASED = {
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_expert_groups": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "fp8",
}


# The port.

CUTS = {"embed": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "head": 0, "wo": 1, "w2": 1}
RENAMED = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attn",
    "mlp": "ffn",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "head",
    "weight_scale_inv": "scale",
    "e_score_correction_bias": "bias",
}


def port(source: Path, folder: Path, world: int) -> dict[str, bytes]:
    """Writes every rank's shard with safetensors; returns the files by name."""
    config = json.loads((source / "config.json").read_text())
    local = config["n_routed_experts"] // world
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(world)]
    for path in source.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            words = name.removeprefix("model.").split(".")
            if words[0] == "layers" and int(words[1]) >= config["num_hidden_layers"]:
                continue
            new = ".".join(RENAMED.get(word, word) for word in words)
            cut = CUTS.get(new.split(".")[-2])
            for rank in range(world):
                if ".experts." in new:
                    if int(new.split(".")[-3]) // local == rank:
                        ranks[rank][new] = tensor
                elif cut is None:
                    ranks[rank][new] = tensor
                else:
                    size = tensor.size(cut) // world
                    ranks[rank][new] = tensor.narrow(cut, rank * size, size).contiguous()
    folder.mkdir()
    for rank, tensors in enumerate(ranks):
        save_file(tensors, folder / f"model{rank}-mp{world}.safetensors", metadata={"format": "pt"})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parameters(args: dict[str, Any], rank: int, world: int) -> dict[str, tuple[int, ...]]:
    """Returns what the demo's model of these arguments has on one rank, scales and Gate's bias included."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = (rows, columns)
        if args["dtype"] == "fp8":
            found[f"{name}.scale"] = (-(-rows // 128), -(-columns // 128))

    def mlp(name: str, width: int) -> None:
        for part, shape in {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}.items():
            linear(f"{name}.{part}", *shape)

    dim, heads, experts = args["dim"], args["n_heads"] // world, args["n_routed_experts"] // world
    query = args["qk_nope_head_dim"] + args["qk_rope_head_dim"]
    found["embed.weight"] = found["head.weight"] = (args["vocab_size"] // world, dim)
    found["norm.weight"] = (dim,)
    for layer in range(args["n_layers"]):
        attn, ffn = f"layers.{layer}.attn", f"layers.{layer}.ffn"
        found[f"layers.{layer}.attn_norm.weight"] = found[f"layers.{layer}.ffn_norm.weight"] = (dim,)
        if args["q_lora_rank"]:
            linear(f"{attn}.wq_a", args["q_lora_rank"], dim)
            found[f"{attn}.q_norm.weight"] = (args["q_lora_rank"],)
            linear(f"{attn}.wq_b", heads * query, args["q_lora_rank"])
        else:
            linear(f"{attn}.wq", heads * query, dim)
        linear(f"{attn}.wkv_a", args["kv_lora_rank"] + args["qk_rope_head_dim"], dim)
        found[f"{attn}.kv_norm.weight"] = (args["kv_lora_rank"],)
        linear(f"{attn}.wkv_b", heads * (args["qk_nope_head_dim"] + args["v_head_dim"]), args["kv_lora_rank"])
        linear(f"{attn}.wo", dim, heads * args["v_head_dim"])
        if layer < args["n_dense_layers"]:
            mlp(ffn, args["inter_dim"] // world)
            continue
        found[f"{ffn}.gate.weight"] = (args["n_routed_experts"], dim)
        found[f"{ffn}.gate.bias"] = (args["n_routed_experts"],)
        for expert in range(rank * experts, (rank + 1) * experts):
            mlp(f"{ffn}.experts.{expert}", args["moe_inter_dim"])
        mlp(f"{ffn}.shared_experts", args["n_shared_experts"] * args["moe_inter_dim"] // world)
    return found


# Fixtures.


@dataclass(frozen=True)
class Case:
    """A conversion, as the tools of `conftest.py` run one."""

    source: Path
    world: int
    expected: dict[str, bytes] = field(default_factory=dict)

    def convert(self, destination: Path, **options: Any) -> Any:
        options = {"device": "cpu", "workers": 1} | options
        return dsv3_tools.convert_to_deepseek_infer(
            self.source, destination, model_parallel=self.world, **options
        )


@pytest.fixture(scope="module")
def sources(tools, miniature, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("infer")
    made = {
        "fp8": tools.make(root / "fp8", layers=3, experts=4, overrides=FP8),
        "ue8m0": tools.make(root / "ue8m0", layers=2, experts=4, overrides=FP8, weights="fp8-ue8m0"),
        "bf16": tools.make(root / "bf16", layers=3, experts=8, overrides=BF16, weights="bf16"),
        "miniature": miniature,
        "miniature bf16": root / "miniature-bf16",
    }
    dsv3_tools.convert_fp8_to_bf16(miniature, made["miniature bf16"], device="cpu")
    return made


@pytest.fixture
def own(sources, tools, tmp_path):
    """Returns a function that copies a source for a test to change."""
    return lambda name: tools.copy(sources[name], tmp_path / "own")


def plan(source: Path, world: int = 2, **options: Any):
    with Checkpoint(source) as checkpoint:
        return plan_to_deepseek_infer(checkpoint, model_parallel=world, **options)


def refusal(source: Path, world: int = 2, kind: type[Exception] = PlanError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        plan(source, world, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The same bytes.


@pytest.mark.parametrize(
    ("name", "world"),
    [(name, world) for name in ("fp8", "ue8m0", "bf16", "miniature bf16") for world in (1, 2, 4)]
    + [("miniature", 1)],
)
def test_shards_are_those_of_the_demos_converter(sources, tools, tmp_path, name, world):
    expected = port(sources[name], tmp_path / "port", world)
    result = Case(sources[name], world).convert(tmp_path / "out", workers=2)
    found = tools.snapshot(tmp_path / "out")
    assert {n: d for n, d in found.items() if n.endswith(".safetensors")} == expected
    assert result.shards_written == world
    assert result.nbytes_out == sum(map(len, expected.values()))
    tokenizer = {path.name: path.read_bytes() for path in sources[name].glob("*token*")}
    assert tokenizer
    assert found.keys() == {*expected, *tokenizer, CONFIG, MANIFEST, "README.md"}
    assert all(found[n] == data for n, data in tokenizer.items())
    args = json.loads(found[CONFIG])
    for rank in range(world):
        tensors = load_file(tmp_path / "out" / f"model{rank}-mp{world}.safetensors")
        assert {n: tuple(t.shape) for n, t in tensors.items()} == parameters(args, rank, world)


def test_control_the_port_notices_ranks_that_are_swapped(sources, tmp_path):
    expected = port(sources["bf16"], tmp_path / "port", 2)
    Case(sources["bf16"], 2).convert(tmp_path / "out")
    first, second = ((tmp_path / "out" / f"model{rank}-mp2.safetensors").read_bytes() for rank in (0, 1))
    assert first == expected["model0-mp2.safetensors"] != second


def test_pieces_of_one_row_give_the_same(sources, tools, tmp_path, monkeypatch):
    """Parts beside each other are read row by row, whatever the size of a piece."""
    from dsv3_tools.conversion import pipeline_cpu

    expected = port(sources["fp8"], tmp_path / "port", 4)
    monkeypatch.setattr(pipeline_cpu, "PIECE_NBYTES", 300)
    Case(sources["fp8"], 4).convert(tmp_path / "out")
    found = tools.snapshot(tmp_path / "out")
    assert {name: found[name] for name in expected} == expected


def test_the_mtp_module_is_left_out(sources):
    with Checkpoint(sources["fp8"]) as checkpoint:
        found = plan_to_deepseek_infer(checkpoint, model_parallel=2)
        mtp = {name for name in checkpoint.specs if name.startswith("model.layers.3.")}
    assert len(mtp) > 20
    assert found.dropped == dict.fromkeys(mtp, "DeepSeek's inference demo has no MTP module")
    assert not any(".3." in name for shard in found.shards for name in shard.specs() if "experts" not in name)
    assert json.loads(found.config)["n_layers"] == 3


def test_what_travels(sources):
    found = plan(sources["bf16"])
    assert found.side_files == ("tokenizer.json",)
    assert set(found.left_behind) == {
        "chat_template.jinja",
        "generation_config.json",
        "modeling_deepseek.py",
        "optimizer.bin",
    }


# The configuration.


def test_deepseek_v3_for_sixteen_ranks(v3):
    began = time.process_time()
    with Checkpoint(v3) as checkpoint:
        found = plan_to_deepseek_infer(checkpoint, model_parallel=16)
        specs = {n: s for n, s in checkpoint.specs.items() if not n.startswith("model.layers.61.")}
    assert time.process_time() - began < 20
    assert json.loads(found.config) == RELEASED
    assert list(json.loads(found.config)) == list(RELEASED)
    assert found.notes == ()
    assert len(found.dropped) == 1564
    assert [shard.name for shard in found.shards] == [f"model{rank}-mp16.safetensors" for rank in range(16)]
    # Each rank has all of these.
    small = ("layernorm.weight", "norm.weight", "q_a_proj", "kv_a_proj_with_mqa", ".gate.")
    alike = {n: s for n, s in specs.items() if any(word in n for word in small)}
    whole = sum(spec.nbytes for spec in specs.values())
    assert whole == 673_150_611_808
    assert found.payload_nbytes == whole + 15 * sum(spec.nbytes for spec in alike.values())
    experts = sum(".experts." in name for name in specs)
    assert found.num_tensors_out == experts + 16 * (len(specs) - experts)
    assert found.total_parameters == 671_026_419_200
    args = json.loads(found.config)
    for rank in (0, 15):
        shapes = {name: spec.shape for name, spec in found.shards[rank].specs().items()}
        assert shapes == parameters(args, rank, 16)


def test_the_config_of_v3_1_names_its_scales(sources):
    found = json.loads(plan(sources["ue8m0"]).config)
    assert (found["dtype"], found["scale_fmt"]) == ("fp8", "ue8m0")
    assert "scale_fmt" not in json.loads(plan(sources["fp8"]).config)
    assert json.loads(plan(sources["bf16"]).config)["dtype"] == "bf16"


def args_of(source: Path, **changes: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    with Checkpoint(source) as checkpoint:
        document = {k: v for k, v in (checkpoint.config_json | changes).items() if v != "absent"}
        return (
            model_args(document, checkpoint.config, None),
            tuple(unlike_demo(document, checkpoint.config)),
        )


ROPE = {"original_seq_len", "rope_theta", "rope_factor", "beta_fast", "beta_slow", "mscale"}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
SCALES = {"mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"rope_theta": 50000}, {"rope_theta": 50000}),
        ({"rope_scaling": None}, {"rope_factor": 1.0}),
        ({"rope_scaling": YARN | SCALES | {"factor": 32}}, {"rope_factor": 32}),
        (
            {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 16, "beta_slow": 2}},
            {"mscale": 0.7, "beta_fast": 16, "beta_slow": 2},
        ),
        (
            {
                "rope_scaling": "absent",
                "rope_theta": "absent",
                "rope_parameters": YARN
                | SCALES
                | {"rope_theta": 7, "original_max_position_embeddings": 8192},
            },
            {"rope_theta": 7, "original_seq_len": 8192},
        ),
    ],
    ids=str,
)
def test_rope_arguments_where_they_are_not_the_demos_own(sources, changes, expected):
    found, _ = args_of(sources["bf16"], **changes)
    assert {key: value for key, value in found.items() if key in ROPE} == expected


def test_defaults_and_numbers(sources):
    found, _ = args_of(sources["bf16"], routed_scaling_factor="absent", scoring_func=None)
    assert (found["route_scale"], found["score_func"], found["q_lora_rank"]) == (2.5, "sigmoid", 0)
    with pytest.raises(CheckpointError, match="routed_scaling_factor is 'much', expected a number"):
        args_of(sources["bf16"], routed_scaling_factor="much")
    with pytest.raises(CheckpointError, match=r"rope_scaling\.factor is 'True', expected a number"):
        args_of(sources["bf16"], rope_scaling=YARN | {"factor": True})


def test_what_the_demo_computes_otherwise_is_said(sources):
    released = "the demo's class Gate has a bias only for hidden size 7168"
    (only,) = args_of(sources["bf16"])[1]
    assert only.startswith(released)
    changes = {
        "rms_norm_eps": 1e-5,
        "norm_topk_prob": False,
        "rope_scaling": {"type": "linear", "factor": 2, "mscale": 1.0, "mscale_all_dim": 0.5},
    }
    notes = args_of(sources["bf16"], **changes)[1]
    assert len(notes) == 5
    for words in ("rms_norm_eps 1e-05", "always normalizes", "mscale_all_dim 0.5", "type 'linear'"):
        assert sum(words in note for note in notes) == 1


# Refusals.


def test_ranks_that_do_not_divide_are_refused_in_one_message(sources):
    message = refusal(sources["bf16"], 3, UsageError)
    for words in (
        "--model-parallel 3",
        "4 attention heads",
        "8 routed experts",
        "64 tokens in the vocabulary",
        "embed_tokens (1): 64 rows",
        "lm_head (1): 64 rows",
        "mlp.down_proj (1): 20 columns",
        "self_attn.q_proj (3): 64 rows",
        "self_attn.kv_b_proj (3): 52 rows",
    ):
        assert words in message
    assert "cannot be cut into equal parts" in message
    assert "shared_experts" not in message  # 12 rows


def test_ranks_that_would_begin_within_a_block_are_refused(tools, tmp_path):
    """160 rows have two rows of scales, which two ranks could share, but not 80 rows each."""
    narrow = FP8 | {"intermediate_size": 160}
    source = tools.make(tmp_path / "source", layers=1, experts=4, overrides=narrow)
    message = refusal(source, 2, UsageError)
    assert "mlp.gate_proj (1): 160 rows cannot be cut into parts of whole blocks of 128" in message
    assert "mlp.down_proj (1): 160 columns" in message
    assert "mlp.up_proj" in message
    assert message.count("cannot be cut") == 3
    assert plan(source, 1).shards[0].name == "model0-mp1.safetensors"


@pytest.mark.parametrize("world", [0, -2])
def test_no_rank_at_all_is_refused(sources, world):
    assert "expected 1 or more" in refusal(sources["bf16"], world, UsageError)


def test_nothing_is_written_when_ranks_do_not_divide(sources, tmp_path):
    with pytest.raises(UsageError):
        Case(sources["fp8"], 3).convert(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (INT4Packed(), "weights are int4_packed"),
        (INT8Channel(), "weights are int8_channel"),
        (INT8Block(), "weights are int8_block"),
    ],
)
def test_integers_are_refused(own, tools, quantization, words):
    source = own("fp8")
    config = (
        quantization.quantization_config()
        if isinstance(quantization, INT8Block)
        else compressed_tensors.quantization_config([(quantization, ["Linear"])], ["lm_head"])
    )
    tools.edit_config(source, lambda document: document.update(quantization_config=config))
    message = refusal(source, 2, FormatError)
    assert words in message
    assert "convert to BF16 first" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_scale_semantics": "inverse"}, "reciprocal scales weight_scale_inv"),
        ({"weight_block_size": [64, 128]}, "blocks of 64 x 128"),
    ],
)
def test_other_fp8_is_refused(own, tools, changes, words):
    source = own("fp8")
    tools.edit_config(source, lambda config: config["quantization_config"].update(changes))
    message = refusal(source, 2, FormatError)
    assert words in message
    assert "convert to BF16 first" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0"),
        ({"scoring_func": "relu"}, "scoring_func is 'relu'"),
        ({"model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 8}, "indexer of V3.2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_that_the_demo_has_not_are_refused(tools, tmp_path, changes, words):
    source = tools.make(
        tmp_path / "source", layers=2, experts=4, overrides=BF16 | changes, weights="bf16", sparse=True
    )
    message = refusal(source, 2, CheckpointError)
    assert words in message
    assert "demo has no such model" in message


def test_tensors_that_the_demo_has_not_are_refused(own, tools):
    source = own("bf16")

    def change(shards: dict[str, dict[str, torch.Tensor]]) -> None:
        first = next(iter(shards.values()))
        first["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        first["model.layers.0.self_attn.o_proj.bias"] = torch.ones(160, dtype=torch.bfloat16)
        first["model.norm.e_score_correction_bias"] = torch.ones(3)
        for tensors in shards.values():
            for name in tensors:
                if name.endswith(("layers.1.self_attn.o_proj.weight", "lm_head.weight")):
                    tensors[name] = tensors[name].to(torch.float16)

    tools.edit(source, change)
    message = refusal(source, partial=True)
    for name in ("rotary_emb.inv_freq", "o_proj.bias", "norm.e_score_correction_bias"):
        assert f"{name} has no counterpart" in message
    assert "layers.1.self_attn.o_proj.weight is f16, expected bf16" in message
    assert "lm_head.weight is f16, expected bf16" in message


def test_scales_that_do_not_fit_are_refused(own, tools):
    source = own("fp8")

    def change(shards: dict[str, dict[str, torch.Tensor]]) -> None:
        for tensors in shards.values():
            for name in list(tensors):
                if name.endswith("layers.0.self_attn.o_proj.weight_scale_inv"):
                    del tensors[name]
                elif name.endswith("layers.1.self_attn.o_proj.weight_scale_inv"):
                    tensors[name] = tensors[name][:1]
                elif name.endswith("layers.2.self_attn.o_proj.weight"):
                    tensors[name] = tensors[name].to(torch.bfloat16)

    tools.edit(source, change)
    message = refusal(source)
    assert "layers.0.self_attn.o_proj.weight_scale_inv is missing" in message
    assert "layers.1.self_attn.o_proj.weight_scale_inv is F32 [1, 4], expected F32 [2, 4]" in message
    assert "layers.2.self_attn.o_proj.weight is bf16, expected fp8_block" in message


def test_scales_that_are_reciprocals_are_refused(own, tools, tmp_path):
    source = own("fp8")

    def invert(shards: dict[str, dict[str, torch.Tensor]]) -> None:
        for tensors in shards.values():
            for name in tensors:
                if name.endswith("weight_scale_inv"):
                    tensors[name] = tensors[name].reciprocal()

    tools.edit(source, invert)
    with pytest.raises(CheckpointError, match="are its scales reciprocals"):
        Case(source, 2).convert(tmp_path / "out")


def test_a_nan_is_refused_by_its_place_in_the_whole_tensor_and_counted_once(own, tools, tmp_path):
    source = own("bf16")
    name = "model.layers.0.self_attn.o_proj.weight"  # 160 x 12: a rank of two has 6 columns
    tools.poke(source, name, 5 * 12 + 8, b"\xc0\x7f")
    with pytest.raises(CheckpointError, match=rf"{name}: the element at \[5, 8\] is NaN"):
        Case(source, 2).convert(tmp_path / "out")
    tools.poke(source, "model.norm.weight", 1, b"\xc0\x7f")
    result = Case(source, 2).convert(tmp_path / "out", nonfinite="keep", overwrite=True)
    assert result.nonfinite == {name: 1, "model.norm.weight": 1}


# The write protocol.


@pytest.fixture(scope="module")
def killable(sources, tools, tmp_path_factory) -> Case:
    out = tmp_path_factory.mktemp("whole") / "out"
    case = Case(sources["bf16"], 2)
    tools.convert_quickly(case, out)
    return Case(sources["bf16"], 2, tools.snapshot(out))


def violations(tools, folder: Path, expected: dict[str, bytes]) -> str:
    found = {n: d for n, d in tools.snapshot(folder).items() if not n.startswith(".dsv3/")}
    problems = [name for name, data in found.items() if expected.get(name) != data]
    if MANIFEST in found and found.keys() != expected.keys():
        problems.append("the manifest is there before the rest")
    return "; ".join(problems)


def test_killed_anywhere_and_run_again(killable, tools, tmp_path):
    out = tmp_path / "out"
    total = tools.count_calls(killable, out)
    assert total > 100
    for number in range(1, total + 1, 3):
        shutil.rmtree(out, ignore_errors=True)
        assert tools.killed_at(killable, out, lambda n, *_, at=number: n == at)
        assert not violations(tools, out, killable.expected), number
        if (out / ".dsv3").exists():
            with pytest.raises(CheckpointError, match="has not finished"):
                dsv3_tools.inspect(out)
        before = tools.journalled(out)
        tools.convert_quickly(killable, out)
        assert not tools.is_same(tools.snapshot(out), killable.expected), number
        assert {name: tools.identity(out / name) for name in before} == before


def test_a_shard_damaged_after_the_manifest_withdraws_it(killable, tools, tmp_path):
    out = tmp_path / "out"

    def removes_workspace(number: int, name: str, args: tuple[Any, ...]) -> bool:
        return name == "unlink" and (out / MANIFEST).exists()

    assert tools.killed_at(killable, out, removes_workspace)
    data = bytearray((out / "model1-mp2.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model1-mp2.safetensors").write_bytes(data)
    assert tools.killed_at(killable, out, lambda _, name, *__: name == "pwrite")
    assert not (out / MANIFEST).exists()
    tools.convert_quickly(killable, out)
    assert not tools.is_same(tools.snapshot(out), killable.expected)


def test_finished_is_already_complete(killable, tmp_path):
    out = tmp_path / "out"
    killable.convert(out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = killable.convert(out)
    assert (again.already_complete, again.shards_resumed) == (True, 2)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / "model0-mp2.safetensors").unlink()
    with pytest.raises(DestinationError, match="--overwrite"):
        killable.convert(out)
    with pytest.raises(DestinationError, match="--overwrite"):
        Case(killable.source, 4).convert(out)


def test_overwriting_leaves_nothing_of_the_other_kind(killable, tools, tmp_path, miniature):
    out, bf16 = tmp_path / "out", tmp_path / "bf16"
    Case(killable.source, 4).convert(out)
    killable.convert(out, overwrite=True)
    assert not tools.is_same(tools.snapshot(out), killable.expected)
    dsv3_tools.convert_fp8_to_bf16(miniature, bf16, device="cpu")
    expected = tools.snapshot(bf16)
    dsv3_tools.convert_fp8_to_bf16(miniature, out, device="cpu", overwrite=True)
    assert not tools.is_same(tools.snapshot(out), expected)
    (out / MANIFEST).unlink()  # a checkpoint of somebody else
    (out / "generation_config.json").unlink()
    killable.convert(out, overwrite=True)
    (out / "tokenizer_config.json").unlink()
    assert not tools.is_same(tools.snapshot(out), killable.expected)


# Afterwards.


@pytest.fixture
def result(killable, tools, tmp_path) -> Path:
    tools.convert_quickly(killable, tmp_path / "result")
    return tmp_path / "result"


def test_integrity_finds_what_has_changed(result):
    report = dsv3_tools.verify_integrity(result)
    assert report.passed
    assert (report.hashes_from, report.files_hashed) == ("manifest", 4)
    for path in sorted(path for path in result.iterdir() if path.name != "README.md"):
        data = path.read_bytes()
        changed = bytearray(data)
        changed[len(data) // 2] ^= 4
        path.write_bytes(changed)
        assert not dsv3_tools.verify_integrity(result).passed, path.name
        path.write_bytes(data)
        path.unlink()
        if path.name != MANIFEST:
            assert any(path.name in problem for problem in dsv3_tools.verify_integrity(result).problems)
        path.write_bytes(data)
    assert dsv3_tools.verify_integrity(result).passed


def test_integrity_without_a_manifest_checks_the_structure(result, tmp_path):
    """As of what the demo's own converter wrote."""
    for name in (MANIFEST, CONFIG):
        (result / name).unlink()
    report = dsv3_tools.verify_integrity(result)
    assert (report.passed, report.hashes_from) == (True, None)
    first = result / "model0-mp2.safetensors"
    data = first.read_bytes()
    first.write_bytes(data[:-1])
    assert "model0-mp2.safetensors" in dsv3_tools.verify_integrity(result).problems[0]
    first.rename(result / "model0-mp4.safetensors")
    assert "shards of 2 conversions" in dsv3_tools.verify_integrity(result).problems[0]
    (result / "model0-mp4.safetensors").rename(result / "model2-mp2.safetensors")
    assert "1 ranks are missing: model0-mp2" in dsv3_tools.verify_integrity(result).problems[0]
    first.write_bytes(data)
    assert "2 ranks have no model2-mp2" in dsv3_tools.verify_integrity(result).problems[0]


def test_other_commands_say_what_it_is(result, tmp_path):
    with pytest.raises(CheckpointError, match="one shard for each rank of DeepSeek's inference demo"):
        dsv3_tools.inspect(result)
    with pytest.raises(CheckpointError, match="one shard for each rank"):
        dsv3_tools.convert_fp8_to_bf16(result, tmp_path / "out")


# Memory.

PEAK = """
import json, os, sys
os.fsync = lambda _: None
import dsv3_tools
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
warm_up, source, out = sys.argv[1:]
dsv3_tools.convert_to_deepseek_infer(warm_up, out + "-warm-up", model_parallel=2, device="cpu", workers=1)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
dsv3_tools.convert_to_deepseek_infer(source, out, model_parallel=2, device="cpu", workers=1)
print(json.dumps(status("VmHWM") - before))
"""


def test_peak_memory_is_bounded(sources, tools, tmp_path):
    """Neither the tensors that are cut along rows nor those along columns are ever whole in memory."""
    wide = FP8 | {"hidden_size": 2048, "intermediate_size": 51_200, "vocab_size": 25_600}
    source = tools.make(
        tmp_path / "source", layers=1, experts=4, overrides=wide, weights="bf16", shards=1, sparse=True
    )
    largest = 51_200 * 2048 * 2
    command = [sys.executable, "-c", PEAK, str(sources["bf16"]), str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < min(64 * 10**6, largest / 3)
    cut = np.fromfile(tmp_path / "out" / "model0-mp2.safetensors", dtype=np.uint8, count=8)
    assert int.from_bytes(cut.tobytes(), "little") > 1000
