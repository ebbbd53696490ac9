"""The MTP module against the miniature's own MTP layer, which is made of transformers' modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools
from dsv3_tools import Checkpoint
from dsv3_tools.errors import UsageError
from dsv3_tools.model.transformer import Transformer
from tests.model.models import bound, check_within, distance, make, run_mtp, some_tokens


@pytest.fixture(scope="module")
def converted(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mtp") / "bf16"
    dsv3_tools.convert_fp8_to_bf16(miniature, path, device="cpu")
    return path


@pytest.fixture(scope="module")
def tokens(miniature: Path) -> torch.Tensor:
    return load_file(miniature.with_name("heldout_tokens.safetensors"))["tokens"].long()[:3, :100]


@pytest.fixture(scope="module")
def theirs(converted: Path, tokens: torch.Tensor) -> torch.Tensor:
    from miniature.export import from_released, read_checkpoint
    from miniature.model import predict

    weights = read_checkpoint(converted)
    with torch.no_grad():
        _, ahead = predict(*from_released(weights), tokens)
    return ahead


def ours(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    with Checkpoint(directory) as checkpoint:
        return run_mtp(Transformer(checkpoint), tokens)


def test_logits(converted: Path, tokens: torch.Tensor, theirs: torch.Tensor) -> None:
    check_within(ours(converted, tokens), theirs, bound(converted, tokens, run_mtp))


def edited(directory: Path, into: Path, change) -> Path:
    """Copies a checkpoint, its tensors changed, as one file."""
    weights = {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}
    change(weights)
    into.mkdir()
    save_file(weights, into / "model.safetensors")
    shutil.copy(directory / "config.json", into)
    return into


def _swap(weights, one: str, other: str) -> None:
    weights[one], weights[other] = weights[other], weights[one]


def _turn(weights) -> None:
    """The hidden state's columns of eh_proj first."""
    name = "model.layers.5.eh_proj.weight"
    weights[name] = weights[name].roll(weights[name].shape[0], dims=1).contiguous()


P = "model.layers.5."
WRONG = {
    "eh_proj's halves": _turn,
    "enorm and hnorm": lambda w: _swap(w, P + "enorm.weight", P + "hnorm.weight"),
    "norm of the head": lambda w: _swap(w, P + "shared_head.norm.weight", "model.norm.weight"),
    "the main model's experts": lambda w: _swap(
        w, P + "mlp.experts.1.up_proj.weight", "model.layers.4.mlp.experts.1.up_proj.weight"
    ),
    "norm off by a percent": lambda w: w.update({P + "hnorm.weight": w[P + "hnorm.weight"].float() * 1.01}),
}


@pytest.mark.parametrize("name", WRONG)
def test_negative_control(converted, tokens, theirs, tmp_path: Path, name: str) -> None:
    wrong = edited(converted, tmp_path / "wrong", WRONG[name])
    assert distance(ours(wrong, tokens), theirs) > 1e-3


def test_negative_control_the_norm_before_the_head_is_left_out(
    converted, tokens, theirs, monkeypatch
) -> None:
    from dsv3_tools.model import mtp

    real = mtp.mtp_unit
    monkeypatch.setattr(mtp, "Wanted", lambda _, **__: real(5)["enorm"])
    assert distance(ours(converted, tokens), theirs) > 1e-2


def test_without_its_copies_it_uses_the_main_models(converted, tokens, theirs, tmp_path: Path) -> None:
    def drop(weights) -> None:
        for name in ("embed_tokens", "shared_head.head"):
            copy = weights.pop(f"{P}{name}.weight")
            main = "lm_head" if "head" in name else "model.embed_tokens"
            assert torch.equal(copy, weights[f"{main}.weight"])

    small = edited(converted, tmp_path / "small", drop)
    assert torch.equal(ours(small, tokens), ours(converted, tokens))


def test_its_own_copies_are_used(converted, tokens, theirs, tmp_path: Path) -> None:
    for name in ("embed_tokens", "shared_head.head"):
        wrong = edited(converted, tmp_path / name, lambda w, name=name: w[f"{P}{name}.weight"].mul_(-1))
        assert distance(ours(wrong, tokens), theirs) > 1e-2


def test_two_layers_and_none(tmp_path: Path) -> None:
    two = make(tmp_path / "two", {"num_nextn_predict_layers": 2})
    tokens = some_tokens(2, 12)
    with Checkpoint(two) as checkpoint:
        model = Transformer(checkpoint)
        assert model.mtp_layers == range(3, 5)
        hidden = model.embed(tokens)
        for index in range(2):
            mtp = model.mtp(index)
            hidden, routes = mtp.forward(hidden[:, :-1], tokens[:, 1 + index :])
            assert routes is not None
            other, following = hidden.flip(1), tokens[:, 1 + index :]
            _, taken = mtp.forward(other, following, routes=routes)
            assert torch.equal(taken.indices, routes.indices)
            assert not torch.equal(mtp.forward(other, following)[1].indices, routes.indices)
        with pytest.raises(UsageError, match="MTP layer 2 is asked for, the checkpoint has 2"):
            model.mtp(2)
    config = json.loads((two / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (two / "config.json").write_text(json.dumps(config))
    with Checkpoint(two) as checkpoint, pytest.raises(UsageError, match="the checkpoint has 0"):
        Transformer(checkpoint).mtp()
