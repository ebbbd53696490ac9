"""`verify mtp`: the acceptance of the shipped model's module is the one noted when it was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools
from dsv3_tools.errors import CheckpointError, UsageError
from dsv3_tools.verify.mtp import MtpReport
from tests.model.models import make, some_tokens

Weights = dict[str, torch.Tensor]
P = "model.layers.5."


@pytest.fixture(scope="module")
def tokens(miniature: Path) -> Path:
    return miniature.with_name("heldout_tokens.safetensors")


@pytest.fixture(scope="module")
def bf16(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify-mtp") / "bf16"
    dsv3_tools.convert_fp8_to_bf16(miniature, path, device="cpu")
    return path


def judge(source: Path, tokens: Path, **options) -> MtpReport:
    options = {"tokens": tokens, "max_tokens": 1028, "drafts": 1, "device": "cpu"} | options
    return dsv3_tools.verify_mtp(source, **options)


def changed(directory: Path, into: Path, change: Callable[[Weights], Weights], config=None) -> Path:
    weights = {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}
    into.mkdir()
    save_file(change(weights), into / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((directory / "config.json").read_text()) | (config or {})
    (into / "config.json").write_text(json.dumps(document))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, into)
    return into


def test_figures_noted_at_training(miniature: Path, tokens: Path) -> None:
    """Made by transformers' modules on the same tokens, when the model was trained."""
    noted = json.loads(miniature.with_name("training.json").read_text())["heldout_fp8"]
    report = judge(miniature, tokens, max_tokens=None)
    assert report.passed
    (first,) = report.drafts
    assert first.num_positions == 64 * 255
    assert abs(first.acceptance - noted["mtp_acceptance"]) <= 2 / first.num_positions
    assert abs(first.accuracy - noted["mtp_top1_accuracy"]) <= 2 / first.num_positions
    assert first.loss == pytest.approx(noted["mtp_loss"], abs=1e-5)
    assert report.loss == pytest.approx(noted["loss"], abs=1e-5)
    assert report.expected_tokens == (1 + first.acceptance,)
    assert report.chance < 0.1


def test_several_drafts_against_transformers(bf16: Path, tokens: Path) -> None:
    """The recursion, written with the miniature's own module."""
    from miniature.export import from_released, read_checkpoint

    ids = load_file(tokens)["tokens"].long()[:2]
    model, mtp = from_released(read_checkpoint(bf16))
    accepted, kept = [], None
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        greedy = model.lm_head(hidden).argmax(-1)
        for number in (1, 2, 3):
            embedded = model.model.embed_tokens(ids[:, number:])
            joined = mtp.join(hidden[:, :-1], embedded)
            places = torch.arange(joined.shape[1]).unsqueeze(0)
            rope = model.model.rotary_emb(joined, position_ids=places)
            hidden = mtp.shared_head["norm"](mtp(joined, position_ids=places, position_embeddings=rope))
            right = (model.lm_head(hidden).argmax(-1) == greedy[:, number:])[:, :-1]
            kept = right if kept is None else kept[:, : right.shape[1]] & right
            accepted.append((float(right.double().mean()), float(kept.double().mean())))
    report = judge(bf16, tokens, max_tokens=ids.numel(), drafts=3)
    for found, expected in zip(report.drafts, accepted, strict=True):
        assert found.acceptance == pytest.approx(expected[0], abs=2 / found.num_positions)
        assert found.joint_acceptance == pytest.approx(expected[1], abs=2 / found.num_positions)
    assert [found.is_repeated for found in report.drafts] == [False, True, True]
    assert report.expected_tokens[-1] == pytest.approx(1 + sum(joint for _, joint in accepted), abs=0.01)


def test_bf16_arithmetic_and_quantized_modules_are_as_good(miniature: Path, tokens, tmp_path: Path) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "int4", device="cpu")
    exact = judge(miniature, tokens).drafts[0].acceptance
    for source, options in ((miniature, {"dtype": "BF16"}), (tmp_path / "int4", {})):
        assert judge(source, tokens, **options).drafts[0].acceptance == pytest.approx(exact, abs=0.03)


def _shuffle(weights: Weights) -> Weights:
    """Every matrix of the module keeps its numbers, in another order of rows."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        if name.startswith(P) and weight.ndim == 2 and "embed" not in name and "shared_head" not in name:
            weights[name] = weight[torch.randperm(len(weight), generator=generator)].contiguous()
    return weights


def test_negative_control_a_shuffled_module(bf16: Path, tokens: Path, tmp_path: Path) -> None:
    report = judge(changed(bf16, tmp_path / "shuffled", _shuffle), tokens)
    assert not report.passed
    assert report.drafts[0].acceptance < 2 * report.chance
    assert report.problems[0].startswith("MTP layer 5: ")
    healthy = judge(bf16, tokens)
    assert healthy.passed
    assert healthy.drafts[0].acceptance > 10 * healthy.chance


def test_min_acceptance(bf16: Path, tokens: Path) -> None:
    found = judge(bf16, tokens).drafts[0].acceptance
    assert judge(bf16, tokens, min_acceptance=found).passed
    report = judge(bf16, tokens, min_acceptance=0.9)
    assert report.problems == (
        f"MTP layer 5: {100 * found:.2f} % of its drafts are accepted, expected at least 90 %: "
        "its weights are not those of this model, or wrong",
    )


def _without_module(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if not name.startswith(P)}


def _module(weights: Weights, number: int, *, shared: bool) -> Weights:
    own = {name: weight for name, weight in weights.items() if name.startswith(P)}
    dropped = () if shared else ("embed_tokens", "shared_head.head")
    return {
        name.replace(P, f"model.layers.{number}."): weight
        for name, weight in own.items()
        if not any(part in name for part in dropped)
    }


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layout", ["native", "one layer"])
def test_a_module_in_a_directory_of_its_own(bf16, tokens, tmp_path: Path, layout: str, shared: bool) -> None:
    main = changed(bf16, tmp_path / "main", _without_module, {"num_nextn_predict_layers": 0})
    number, config = 5, {}
    if layout == "one layer":
        config = {"num_hidden_layers": 1, "architectures": ["DeepseekV3ForCausalLMNextN"]}
        number = 0
    module = changed(bf16, tmp_path / "module", lambda w: _module(w, number, shared=shared), config)
    apart, whole = judge(main, tokens, mtp=module, drafts=2), judge(bf16, tokens, drafts=2)
    assert apart.drafts == whole.drafts
    assert apart.module == module
    with pytest.raises(CheckpointError, match=r"there is no MTP module .*--mtp takes one from another"):
        judge(main, tokens)
    # Another model's module is used, not the main model's own.
    shuffled = changed(bf16, tmp_path / "shuffled", lambda w: _module(_shuffle(w), 5, shared=shared))
    assert not judge(bf16, tokens, mtp=shuffled).passed


def test_a_module_that_does_not_fit(bf16: Path, tokens: Path, tmp_path: Path) -> None:
    main = changed(bf16, tmp_path / "main", _without_module, {"num_nextn_predict_layers": 0})
    with pytest.raises(CheckpointError, match=r"no eh_proj\.weight in any layer"):
        judge(bf16, tokens, mtp=main)
    other = make(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"a module for another model: hidden_size is 96, the main model"
    ):
        judge(bf16, tokens, mtp=other)


def test_two_layers_of_mtp(tmp_path: Path) -> None:
    model = make(tmp_path / "two", {"num_nextn_predict_layers": 2})
    save_file({"tokens": some_tokens(2, 40)}, tmp_path / "tokens.safetensors")
    report = judge(model, tmp_path / "tokens.safetensors", drafts=3, min_acceptance=0.0)
    assert [(draft.layer, draft.is_repeated) for draft in report.drafts] == [
        (3, False),
        (4, False),
        (4, True),
    ]
    assert [draft.num_positions for draft in report.drafts] == [2 * 38, 2 * 37, 2 * 36]


def test_two_ranks(bf16: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_tools.verify.mtp.resolve_devices", lambda device, _: device.split(","))
    one, two = (judge(bf16, tokens, max_tokens=514, device=device) for device in ("cpu", "cpu,cpu"))
    assert two.devices == ("cpu", "cpu")
    assert two.drafts[0].acceptance == pytest.approx(one.drafts[0].acceptance, abs=0.005)
    assert two.drafts[0].loss == pytest.approx(one.drafts[0].loss, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafts": 0}, "--drafts: got 0"),
        ({"min_acceptance": 66.0}, "--min-acceptance: got 66, expected a number from 0 to 1"),
        ({"dtype": "F16"}, "--dtype F16"),
        ({"length": 4, "drafts": 3}, "--drafts 3: sequences of 4 tokens leave no position"),
    ],
)
def test_options_that_make_no_sense(options, message: str, bf16: Path, tokens: Path) -> None:
    with pytest.raises(UsageError, match=message):
        judge(bf16, tokens, **options)
