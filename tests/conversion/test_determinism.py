"""The same bytes whatever the workers, the pieces, and the repetition; the plan knows them beforehand."""

from __future__ import annotations

import json

import pytest
import torch

import dsv3_tools
from dsv3_tools.conversion import pipeline_cpu


@pytest.fixture(scope="session")
def mini(tools, tmp_path_factory):
    """A model with an MTP layer and eight shards, in FP8 and in BF16."""
    root = tmp_path_factory.mktemp("mini")
    overrides = {
        "num_nextn_predict_layers": 1,
        "hidden_size": 320,
        "intermediate_size": 448,
        "vocab_size": 200,
    }
    fp8 = tools.make(root / "fp8", layers=3, experts=4, shards=8, overrides=overrides)
    dsv3_tools.convert_fp8_to_bf16(fp8, root / "bf16", device="cpu", workers=1)
    for name, operation in (("int8", "quantize-int8-block"), ("int4", "quantize-int4")):
        convert(root, operation, root / name, workers=1)
    return root


MADE = {
    "quantize-int8": lambda root, out, **o: dsv3_tools.quantize_int8(root / "fp8", out, **o),
    "quantize-int8-block": lambda root, out, **o: dsv3_tools.quantize_int8(
        root / "fp8", out, scheme="block", **o
    ),
    "quantize-int8-from-bf16": lambda root, out, **o: dsv3_tools.quantize_int8(root / "bf16", out, **o),
    "quantize-int4": lambda root, out, **o: dsv3_tools.quantize_int4(
        root / "fp8", out, group_size=32, symmetric=False, **o
    ),
    "quantize-int4-awq": lambda root, out, **o: dsv3_tools.quantize_int4(
        root / "bf16", out, group_size=32, layout="awq", **o
    ),
    "quantize-int4-fp8": lambda root, out, **o: dsv3_tools.quantize_int4(
        root / "fp8", out, group_size=32, rest="fp8", **o
    ),
    "int8-to-bf16": lambda root, out, **o: dsv3_tools.convert_int8_to_bf16(root / "int8", out, **o),
    "int4-to-bf16": lambda root, out, **o: dsv3_tools.convert_int4_to_bf16(root / "int4", out, **o),
}


def convert(root, operation, out, **options):
    if operation in MADE:
        return MADE[operation](root, out, device="cpu", **options)
    if operation == "fp8-to-bf16":
        return dsv3_tools.convert_fp8_to_bf16(root / "fp8", out, device="cpu", **options)
    like = root / "fp8" if operation.endswith("like") else None
    return dsv3_tools.convert_bf16_to_fp8(root / "bf16", out, like=like, device="cpu", **options)


OPERATIONS = pytest.mark.parametrize(
    "operation", ["fp8-to-bf16", "bf16-to-fp8", "bf16-to-fp8-like", *sorted(MADE)]
)


@OPERATIONS
def test_workers_and_repetition(mini, operation, tools, tmp_path):
    convert(mini, operation, tmp_path / "first", workers=1)
    first = tools.snapshot(tmp_path / "first")
    for number, workers in enumerate([1, 2, 8, 1, 2, 8, 2, 8, 8]):
        with tools.interposed(tools.unsynced, ("fsync",)):
            result = convert(mini, operation, tmp_path / str(number), workers=workers)
        assert result.workers == workers
        assert not tools.is_same(tools.snapshot(tmp_path / str(number)), first)


@OPERATIONS
@pytest.mark.parametrize("nbytes", [4096, 20_000, 300_000, 1 << 28])
def test_sizes_of_pieces(mini, operation, tools, tmp_path, monkeypatch, nbytes):
    convert(mini, operation, tmp_path / "usual", workers=1)
    monkeypatch.setattr(pipeline_cpu, "PIECE_NBYTES", nbytes)
    convert(mini, operation, tmp_path / "other", workers=1)
    assert not tools.is_same(tools.snapshot(tmp_path / "other"), tools.snapshot(tmp_path / "usual"))


def test_pieces_of_one_element(tools, tmp_path, monkeypatch):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 130,
        "vocab_size": 4,
        "q_lora_rank": 4,
        "kv_lora_rank": 4,
    }
    tools.make(tmp_path / "fp8", layers=1, shards=2, overrides=sizes)
    convert(tmp_path, "fp8-to-bf16", tmp_path / "bf16", workers=1)
    monkeypatch.setattr(pipeline_cpu, "PIECE_NBYTES", 1)
    convert(tmp_path, "fp8-to-bf16", tmp_path / "other", workers=1)
    assert not tools.is_same(tools.snapshot(tmp_path / "other"), tools.snapshot(tmp_path / "bf16"))


def test_there_and_back_again(mini, tools, tmp_path):
    """FP8 to BF16 to FP8 with the original beside it: the original's bytes, scales included."""
    convert(mini, "bf16-to-fp8-like", tmp_path / "back", workers=2)
    found, original = tools.snapshot(tmp_path / "back"), tools.snapshot(mini / "fp8")
    assert [n for n in original if n.endswith(".safetensors") and found[n] != original[n]] == []


def test_control_changed_weight_does_not_come_back(cases, tools):
    """The same comparison fails for a model with one weight changed."""
    like = cases["bf16-to-fp8-like"]
    original = tools.snapshot(like.like)
    assert [n for n in original if n.endswith(".safetensors") and like.expected[n] != original[n]]


def tensors_of(folder) -> dict[str, torch.Tensor]:
    with dsv3_tools.Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name).reshape(-1).view(torch.uint8) for name in checkpoint.specs}


@OPERATIONS
@pytest.mark.parametrize("bound", [1, 50_000, 300_000, 10**9])
def test_largest_shard(mini, operation, tools, tmp_path, bound):
    plans = []
    convert(mini, operation, tmp_path / "usual", workers=2)
    convert(mini, operation, tmp_path / "out", workers=2, max_shard_size=bound, on_plan=plans.append)
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "usual")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    for shard in plans[0].shards:
        payload = sum(spec.nbytes for spec in shard.specs().values())
        assert payload <= bound or len(shard.steps) == 1
    assert (len(plans[0].shards) == 1) == (bound == 10**9)


def check_prediction(plan, result, out, tools) -> None:
    """Compares everything that the plan foretold with what is on disk, to the byte."""
    files = {path.name: path for path in out.iterdir()}
    sizes = {shard.name: files[shard.name].stat().st_size for shard in plan.shards}
    assert sizes == {shard.name: shard.nbytes for shard in plan.shards}
    assert sizes.keys() == {name for name in files if name.endswith(".safetensors")}
    assert sum(sizes.values()) == plan.nbytes_out == result.nbytes_out
    assert files[tools.index].read_bytes() == plan.index()
    assert files["config.json"].read_bytes() == plan.config
    with dsv3_tools.Checkpoint(out) as checkpoint:
        index = json.loads(plan.index())
        assert index["weight_map"] == dict(checkpoint.weight_map)
        assert index["metadata"]["total_size"] == plan.payload_nbytes == checkpoint.nbytes
        assert plan.num_tensors_out == len(checkpoint.specs)
        for shard in plan.shards:
            assert shard.specs() == dict(checkpoint.shards[shard.name].header.specs)
            assert shard.header_sha256 == checkpoint.shards[shard.name].header_sha256


@pytest.mark.parametrize("weights", ["fp8", "bf16"])
def test_random_plans(tools, tmp_path, chance, weights):
    for number in range(50):
        overrides = {
            "hidden_size": chance.randrange(16, 300, 2),
            "intermediate_size": chance.randrange(16, 300),
            "moe_intermediate_size": chance.randrange(16, 200),
            "vocab_size": chance.randrange(2, 300),
            "q_lora_rank": chance.choice([None, chance.randrange(1, 200)]),
            "kv_lora_rank": chance.randrange(1, 200),
            "num_attention_heads": chance.randrange(1, 5),
            "first_k_dense_replace": chance.randrange(3),
            "num_nextn_predict_layers": chance.randrange(3),
            "n_shared_experts": chance.randrange(3),
            "tie_word_embeddings": chance.random() < 0.2,
        }
        source, out, plans = tmp_path / f"source{number}", tmp_path / f"out{number}", []
        tools.make(
            source,
            weights=weights,
            layers=chance.randrange(1, 4),
            experts=chance.randrange(1, 5),
            shards=chance.randrange(1, 6),
            overrides=overrides,
            sparse=True,
        )
        # The scales of a sparse sample are zero.
        options = {"nonfinite": "keep", "device": "cpu", "on_plan": plans.append}
        if chance.random() < 0.5:
            options["max_shard_size"] = chance.randrange(1, 400_000)
        with tools.interposed(tools.unsynced, ("fsync",)):
            if weights == "fp8":
                result = dsv3_tools.convert_fp8_to_bf16(source, out, **options)
            else:
                fmt = chance.choice(["f32", "ue8m0", None])
                result = dsv3_tools.convert_bf16_to_fp8(source, out, scale_fmt=fmt, **options)
        check_prediction(plans[0], result, out, tools)
