"""`verify logits`: what is equal is equal to the bit, and whatever is wrong is named with its place."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools
from dsv3_tools.errors import CheckpointError, UsageError, VerificationFailed
from dsv3_tools.verify.logits_limits import PRESETS
from dsv3_tools.verify.logits_results import RUNS, LogitsReport

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tokens(miniature: Path) -> Path:
    return miniature.with_name("heldout_tokens.safetensors")


@pytest.fixture(scope="module")
def bf16(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logits") / "bf16"
    dsv3_tools.convert_fp8_to_bf16(miniature, path, device="cpu")
    return path


@pytest.fixture(scope="module")
def quantized(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("logits-quantized")
    dsv3_tools.quantize_int8(miniature, folder / "int8", scheme="channel", device="cpu")
    dsv3_tools.quantize_int8(miniature, folder / "int8 block", scheme="block", device="cpu")
    dsv3_tools.quantize_int4(miniature, folder / "int4", device="cpu")
    dsv3_tools.quantize_int4(miniature, folder / "gptq", layout="gptq", device="cpu")
    return {path.name: path for path in folder.iterdir()}


def compare(reference: Path, candidate: Path, tokens: Path, **options) -> LogitsReport:
    options = {"tokens": tokens, "max_tokens": 1024, "device": "cpu", "baseline": False} | options
    return dsv3_tools.verify_logits(reference, candidate, **options)


def edited(directory: Path, into: Path, change: Callable[[Weights], None], config=None) -> Path:
    """Copies a checkpoint as one file, its tensors and config.json changed."""
    weights = {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}
    change(weights)
    into.mkdir()
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, into)
    document = json.loads((into / "config.json").read_text()) | (config or {})
    (into / "config.json").write_text(json.dumps(document))
    return into


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_bf16_conversion_is_lossless(miniature: Path, bf16: Path, tokens: Path, dtype: str) -> None:
    report = compare(miniature, bf16, tokens, dtype=dtype, max_tokens=300)
    assert report.thresholds == PRESETS["lossless"]
    assert report.passed
    for run in ("replayed", "free"):
        assert report.runs[run].max_logit_error == 0
        assert report.runs[run].kl_max == 0
        assert report.mtp[0][run].max_logit_error == 0
    assert all(not any(layer.hidden.values()) for layer in report.layers)
    assert [layer.kind for layer in report.layers] == ["dense", "moe", "moe", "moe", "moe", "mtp"]
    assert not report.worst


@pytest.mark.parametrize("name", ["int8", "int8 block", "int4", "gptq"])
def test_quantized_models_pass_their_presets(name: str, miniature, quantized, tokens) -> None:
    report = compare(miniature, quantized[name], tokens)
    assert report.thresholds == PRESETS[name.split(maxsplit=1)[0].replace("gptq", "int4")]
    assert report.passed, report.problems
    assert 0 < report.runs["replayed"].kl < report.runs["free"].kl
    assert report.worst[0].kl == pytest.approx(report.runs["replayed"].kl_max)


def test_negative_control_int4_is_not_int8(miniature, quantized, tokens) -> None:
    report = compare(miniature, quantized["int4"], tokens, preset="int8")
    assert not report.passed
    assert any("KL(reference || candidate), routes replayed" in problem for problem in report.problems)
    assert report.problems[0].startswith("4 layers, 1-4: MLP; in layer 1: ")


def test_rounding_is_less_than_quantizing_to_int4(miniature, quantized, tokens) -> None:
    report = compare(miniature, quantized["int4"], tokens, baseline=True)
    assert list(report.runs) == list(RUNS)
    assert 0 < report.runs["noise_replayed"].kl < 0.1 * report.runs["replayed"].kl
    assert report.runs["noise_replayed"].kl < report.runs["noise_free"].kl
    for layer in report.layers:
        assert 0 < layer.hidden["noise_replayed"] < 0.02
        assert layer.hidden["noise_replayed"] <= layer.hidden["noise_free"]


def test_the_baseline_is_the_model_in_the_other_arithmetic(bf16: Path, tokens: Path) -> None:
    """The noise runs against independent passes in float32 and BF16."""
    from dsv3_tools import Checkpoint
    from dsv3_tools.model.transformer import Transformer
    from tests.model.models import run

    ids = load_file(tokens)["tokens"].long()[:2, :64]
    logits = {}
    with Checkpoint(bf16) as checkpoint:
        for dtype in ("F32", "BF16"):
            logits[dtype] = run(Transformer(checkpoint, dtype=dtype), ids).double()
    log_p, log_q = logits["F32"].log_softmax(-1), logits["BF16"].log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    for dtype, expected in (("F32", kl), ("BF16", (log_q.exp() * (log_q - log_p)).sum(-1))):
        report = compare(bf16, bf16, tokens, dtype=dtype, baseline=True, length=64, max_tokens=128)
        found = report.runs["noise_free"]
        assert found.kl == pytest.approx(float(expected.mean()), rel=1e-4)
        assert found.kl_max == pytest.approx(float(expected.max()), rel=1e-4)
        apart = (logits["F32"] - logits["BF16"]).abs()
        assert found.max_logit_error == pytest.approx(float(apart.max()), rel=1e-4)
        assert found.logit_error == pytest.approx(float(apart.mean()), rel=1e-4)


def _swap(one: int, other: int) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            for suffix in ("weight", "weight_scale_inv", "weight_packed", "weight_scale"):
                names = [f"model.layers.2.mlp.experts.{e}.{part}.{suffix}" for e in (one, other)]
                if names[0] in weights:
                    weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]

    return change


def _double_scale(weights: Weights) -> None:
    weights["model.layers.3.mlp.experts.5.down_proj.weight_scale_inv"][0, 0] *= 2


def _round_bias(weights: Weights) -> None:
    name = "model.layers.4.mlp.gate.e_score_correction_bias"
    weights[name] = weights[name].bfloat16().float()


def _turn_rope(weights: Weights) -> None:
    """Stores the dimensions with rope in halves, as for `rope_interleave: false`, in every layer."""
    for name, weight in weights.items():
        if name.endswith("kv_a_proj_with_mqa.weight"):
            rope = weight[128:].clone()
            weights[name] = torch.cat((weight[:128], rope[0::2], rope[1::2]))


def _scale_norm(name: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name] = (weights[name].float() * 1.01).bfloat16()

    return change


def _foreign_mtp(weights: Weights) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        if name.startswith("model.layers.5.") and weight.dtype == torch.bfloat16 and weight.ndim == 2:
            order = torch.randperm(len(weight), generator=generator)
            weights[name] = weight[order].contiguous()


def _scale(name: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name] = (weights[name].float() * 2).to(weights[name].dtype)

    return change


IN_FP8 = {
    "experts swapped": (_swap(3, 7), "layer 2: routed experts [37] "),
    "scale doubled": (_double_scale, "layer 3: routed expert 5 "),
    "bias rounded": (_round_bias, "layer 4: router: scores differ"),
    "bias off": (_scale("model.layers.1.mlp.gate.e_score_correction_bias"), "layer 1: router: scores differ"),
}
IN_BF16 = {
    "experts swapped": (_swap(0, 15), "layer 2: routed experts (0|15) "),
    "rope interleaved wrongly": (_turn_rope, r"5 layers, 0-4: attention .*rope"),
    "norm before attention": (
        _scale_norm("model.layers.3.input_layernorm.weight"),
        "layer 3: attention or the norm before it: error",
    ),
    "norm before experts": (
        _scale_norm("model.layers.2.post_attention_layernorm.weight"),
        "layer 2: router: .*the norm before them",
    ),
    "final norm": (_scale_norm("model.norm.weight"), "final norm or lm_head: error"),
    "another model's MTP": (_foreign_mtp, "MTP layer 5: "),
    "MTP's join": (_scale("model.layers.5.eh_proj.weight"), r"MTP layer 5: input \(eh_proj"),
    "MTP's norm before the head": (
        _scale("model.layers.5.shared_head.norm.weight"),
        r"MTP layer 5: shared_head \(norm or head\)",
    ),
    "MTP's head": (
        lambda w: w.update({"model.layers.5.shared_head.head.weight": w["lm_head.weight"].flip(0)}),
        r"MTP layer 5: shared_head \(norm or head\)",
    ),
    "embedding": (_scale("model.embed_tokens.weight"), "embedding: error"),
    "shared expert": (
        _scale("model.layers.4.mlp.shared_experts.up_proj.weight"),
        "layer 4: experts, or the norm before them",
    ),
    "dense MLP": (_scale("model.layers.0.mlp.up_proj.weight"), "layer 0: MLP or the norm"),
}


@pytest.mark.parametrize(
    ("stored", "name"), [*(("fp8", name) for name in IN_FP8), *(("bf16", name) for name in IN_BF16)]
)
def test_negative_control_names_the_place(stored, name, miniature, bf16, tokens, tmp_path: Path) -> None:
    change, place = (IN_FP8 if stored == "fp8" else IN_BF16)[name]
    wrong = edited(miniature if stored == "fp8" else bf16, tmp_path / "wrong", change)
    report = compare(miniature, wrong, tokens)
    assert not report.passed
    assert re.match(place, report.problems[0]), report.problems


@pytest.mark.parametrize("change", [_swap(3, 7), _scale("model.layers.2.mlp.experts.3.up_proj.weight_scale")])
def test_negative_control_among_errors_of_int4(change, miniature, quantized, tokens, tmp_path: Path) -> None:
    """A wrong expert stands out from what quantizing does to all of them."""
    wrong = edited(quantized["int4"], tmp_path / "wrong", change)
    report = compare(miniature, wrong, tokens)
    assert report.problems[0].startswith("layer 2: routed expert")
    assert "3 (" in report.problems[0]


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A random model with as many experts as DeepSeek-V3, its INT4, and tokens."""
    folder = tmp_path_factory.mktemp("many")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256, "vocab_size": 512}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 0}
    sizes |= {"q_lora_rank": 128, "kv_lora_rank": 128, "num_nextn_predict_layers": 0}
    dsv3_tools.sample(folder / "fp8", layers=2, experts=256, overrides=sizes)
    dsv3_tools.quantize_int4(folder / "fp8", folder / "int4", device="cpu")
    save_file({"tokens": torch.arange(512).view(4, 128) * 7 % 512}, folder / "tokens.safetensors")
    return folder / "fp8", folder / "int4", folder / "tokens.safetensors"


def test_two_of_256_experts(many_experts, tmp_path: Path) -> None:
    """Few tokens for each expert: none of them raises a false alarm, and swapped ones are found."""
    reference, int4, tokens = many_experts
    healthy = compare(reference, int4, tokens, max_kl=9.0, min_top1=0.0, min_top5=0.0)
    assert not [problem for problem in healthy.problems if "expert" in problem]
    weights = load_file(next(iter(sorted(int4.glob("*.safetensors")))))
    assert weights
    wrong = tmp_path / "wrong"
    shutil.copytree(int4, wrong)
    used = max(healthy.layers[1].experts, key=lambda expert: expert.num_tokens).number
    other = (used + 1) % 256
    _swap_on_disk(wrong, 1, used, other)
    report = compare(reference, wrong, tokens)
    assert report.problems[0].startswith("layer 1: routed expert")
    assert re.search(rf"\b{used} \(", report.problems[0])


def _swap_on_disk(directory: Path, layer: int, one: int, other: int) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    prefix = f"model.layers.{layer}.mlp.experts."
    names = [
        name for name in index["weight_map"] if name.startswith((f"{prefix}{one}.", f"{prefix}{other}."))
    ]
    files = {index["weight_map"][name] for name in names}
    weights = {name: w for file in files for name, w in load_file(directory / file).items()}
    swapped = dict(weights)
    for name in names:
        number = other if name.startswith(f"{prefix}{one}.") else one
        swapped[name] = weights[f"{prefix}{number}.{name.split('.', 6)[-1]}"]
    for file in files:
        own = {n: swapped[n] for n, home in index["weight_map"].items() if home == file}
        save_file(own, directory / file, metadata={"format": "pt"})


def test_progress_ends_at_its_total(bf16: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_tools.verify.logits.resolve_devices", lambda device, _: device.split(","))
    for device in ("cpu", "cpu,cpu"):
        steps = []
        compare(bf16, bf16, tokens, max_tokens=32, device=device, on_progress=steps.append)
        assert steps[-1].shards_done == steps[-1].shards_total == len(steps)
        assert steps[-1].nbytes_done == steps[-1].nbytes_total


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.input_layernorm.weight", "layer 3: attention or the norm before it: error"),
        ("model.layers.0.post_attention_layernorm.weight", "layer 0: MLP or the norm before it: error"),
        ("model.layers.5.hnorm.weight", r"MTP layer 5: input \(eh_proj"),
        ("model.norm.weight", "final norm or lm_head: error"),
        ("model.embed_tokens.weight", "embedding: error"),
    ],
)
def test_what_int4_leaves_alone_must_be_equal(name, place, miniature, quantized, tokens, tmp_path) -> None:
    """A percent in a norm is far less than INT4's errors in the experts."""
    wrong = edited(quantized["int4"], tmp_path / "wrong", _scale_norm(name))
    report = compare(miniature, wrong, tokens, max_tokens=256)
    assert re.match(place, report.problems[0]), report.problems


def test_a_limit_by_hand_is_for_all_blocks(miniature, quantized, tokens, tmp_path: Path) -> None:
    wrong = edited(
        quantized["int4"], tmp_path / "wrong", _scale_norm("model.layers.3.input_layernorm.weight")
    )
    report = compare(miniature, wrong, tokens, max_block_error=0.29)
    assert report.passed


def test_a_weight_of_another_shape(bf16: Path, tokens: Path, tmp_path: Path) -> None:
    def cut(weights: Weights) -> None:
        name = "model.layers.3.mlp.gate.weight"
        weights[name] = weights[name][:8].clone()

    wrong = edited(bf16, tmp_path / "wrong", cut)
    with pytest.raises(
        CheckpointError, match=r"gate\.weight is \[8, 256\], config\.json makes it \[16, 256\]"
    ):
        compare(bf16, wrong, tokens)


def test_config_of_another_rope(bf16: Path, tokens: Path, tmp_path: Path) -> None:
    wrong = edited(bf16, tmp_path / "wrong", lambda _: None, {"rope_interleave": False})
    report = compare(bf16, wrong, tokens)
    assert report.problems[0] == "config.json: rope_interleave is False, the reference has True"
    assert any("attention" in problem for problem in report.problems[1:])


def test_not_a_number_is_not_passed(bf16: Path, tokens: Path, tmp_path: Path) -> None:
    def spoil(weights: Weights) -> None:
        weights["model.layers.2.mlp.experts.1.up_proj.weight"][3, 4] = float("nan")

    wrong = edited(bf16, tmp_path / "wrong", spoil)
    report = compare(bf16, wrong, tokens, max_tokens=64)
    assert not report.passed
    assert report.problems[0].startswith("layer 2: ")
    assert "1 (inf)" in report.problems[0]


def test_without_mtp(bf16: Path, tokens: Path, tmp_path: Path) -> None:
    def drop(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith("model.layers.5.")]:
            del weights[name]

    main = edited(bf16, tmp_path / "main", drop, {"num_nextn_predict_layers": 0})
    report = compare(bf16, main, tokens, max_tokens=64)
    assert report.passed
    assert report.mtp == ()
    assert "MTP layers: the reference has 1, the candidate 0; 0 were compared" in report.notes
    promised = edited(bf16, tmp_path / "promised", drop)
    report = compare(bf16, promised, tokens, max_tokens=64)
    assert report.problems == ("config.json promises 1 MTP layers, 0 are there",)


def test_another_architecture(bf16: Path, tokens: Path, tmp_path: Path) -> None:
    wrong = edited(bf16, tmp_path / "wrong", lambda _: None, {"n_group": 2, "topk_group": 1})
    with pytest.raises(VerificationFailed, match=r"another architecture than .*n_group is 2, the reference"):
        compare(bf16, wrong, tokens)


def test_two_ranks_are_one_within_rounding(bf16, quantized, tokens, monkeypatch) -> None:
    """Only the order of sums differs: logits by float32's rounding, and nothing that is compared by more."""
    monkeypatch.setattr("dsv3_tools.verify.logits.resolve_devices", lambda device, _: device.split(","))
    alone = compare(bf16, quantized["int4"], tokens, max_tokens=256)
    both = compare(bf16, quantized["int4"], tokens, max_tokens=256, device="cpu,cpu")
    assert both.devices == ("cpu", "cpu")
    for run in ("replayed", "free"):
        assert both.runs[run].kl == pytest.approx(alone.runs[run].kl, rel=1e-3)
        assert both.runs[run].top5 == alone.runs[run].top5
    for one, other in zip(alone.layers, both.layers, strict=True):
        assert other.mlp == pytest.approx(one.mlp, rel=1e-3)
        assert other.hidden["replayed"] == pytest.approx(one.hidden["replayed"], rel=1e-3)
    lossless = compare(bf16, bf16, tokens, max_tokens=256, device="cpu,cpu")
    assert lossless.passed


def test_text(miniature: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged, that a single man. " * 4)
    report = dsv3_tools.verify_logits(miniature, miniature, text=text, device="cpu", length=32)
    assert report.passed
    assert report.tokens.startswith("text.txt, ")
    built_in = dsv3_tools.verify_logits(miniature, miniature, device="cpu", length=16, max_tokens=32)
    assert built_in.tokens == "built-in text, 2 x 16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "int2"}, "--preset int2: expected one of lossless"),
        ({"max_kl": -1.0}, "--max-kl: got -1, expected a number from 0"),
        ({"min_top1": 99.0}, "--min-top1: got 99, expected a number from 0 to 1"),
        ({"max_kl": float("nan")}, "--max-kl: got nan"),
        ({"dtype": "F16"}, "--dtype F16: expected F32 or BF16"),
        ({"text": Path("a.txt")}, "got both, expected one of them"),
    ],
)
def test_options_that_make_no_sense(options, message: str, bf16: Path, tokens: Path) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        compare(bf16, bf16, tokens, **options)


def test_a_missing_weight(bf16: Path, tokens: Path, tmp_path: Path, monkeypatch) -> None:
    def drop(weights: Weights) -> None:
        del weights["model.layers.2.self_attn.o_proj.weight"]
        del weights["lm_head.weight"]

    wrong = edited(bf16, tmp_path / "wrong", drop)

    def no_layer(*_: object) -> None:
        raise AssertionError("a layer was begun")

    threads = torch.get_num_threads()
    monkeypatch.setattr("dsv3_tools.model.layer.Layer.attention_all", no_layer)
    with pytest.raises(CheckpointError) as caught:
        compare(bf16, wrong, tokens)
    assert "layers.2.self_attn.o_proj" in str(caught.value)
    assert "lm_head.weight" in str(caught.value)
    assert torch.get_num_threads() == threads


def test_under_torchrun(bf16: Path, quantized, tokens: Path, tmp_path: Path) -> None:
    """The first process speaks for all."""
    script = tmp_path / "script.py"
    script.write_text("from dsv3_tools.cli import main\nmain()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script]
    models = [str(bf16), str(quantized["int4"])]
    options = ["--tokens", str(tokens), "--max-tokens", "256", "--no-baseline", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    run = subprocess.run(
        [*command, "verify", "logits", *models, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    alone = compare(bf16, quantized["int4"], tokens, max_tokens=256)
    assert document["devices"] == ["cpu", "cpu"]
    assert document["runs"]["replayed"]["kl"] == pytest.approx(alone.runs["replayed"].kl, rel=1e-3)
