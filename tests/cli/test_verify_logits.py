"""`dsv3 verify logits` on a terminal, as JSON, and as a page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools


@pytest.fixture(scope="module")
def models(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("verify-logits")
    dsv3_tools.convert_fp8_to_bf16(miniature, folder / "bf16", device="cpu")
    dsv3_tools.convert_fp8_to_bf16(miniature, folder / "wrong", device="cpu")
    for path in (folder / "wrong").glob("*.safetensors"):
        weights = load_file(path)
        if (name := "model.layers.3.mlp.experts.6.up_proj.weight") in weights:
            weights[name] = -weights[name]
            save_file(weights, path, metadata={"format": "pt"})
    return {"reference": miniature} | {path.name: path for path in folder.iterdir()}


OPTIONS = ("--max-tokens", "512", "--length", "256")


def test_equal(dsv3, models) -> None:
    outcome = dsv3("verify", "logits", models["reference"], models["bf16"], *OPTIONS)
    assert (outcome.code, outcome.err) == (0, "")
    first, *lines = outcome.out.splitlines()
    assert first.startswith(
        f"ok: {models['bf16']} against {models['reference']}: built-in text, 2 x 256 tokens"
    )
    figures = {line[:30].strip(): line[30:].split() for line in lines}
    assert figures["KL(reference || run), nats"][:2] == ["0", "0"]
    assert float(figures["KL(reference || run), nats"][2]) > 0  # the noise
    assert figures["top-1 agreement"][:2] == ["100.00%", "100.00%"]
    assert [line.split()[1] for line in lines if line.lstrip()[:1].isdigit()] == [
        "dense",
        "moe",
        "moe",
        "moe",
        "moe",
        "mtp",
    ]


def test_a_wrong_expert(dsv3, models, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ("verify", "logits", models["reference"], models["wrong"], *OPTIONS, "--no-baseline")
    outcome = dsv3(*arguments, "--report", page)
    assert outcome.code == 4
    assert "layer 3: routed expert 6 (" in outcome.error_line
    assert "wrong: layer 3: routed expert 6 (" in outcome.out
    assert f"  report: {page}\n" in outcome.out
    assert "layer 3: routed expert 6 (" in page.read_text()
    assert "noise" not in outcome.out
    again = dsv3(*arguments, "--json")
    assert again.code == 4
    assert again.document["passed"] is False
    assert again.document["problems"][0].startswith("layer 3: routed expert 6")
    assert again.document["runs"]["replayed"]["kl"] > 0
    assert again.document["layers"][3]["experts"][0]["number"] == 6
    assert again.document["tokens"] == "built-in text, 2 x 256"


def test_limits_by_hand(dsv3, models) -> None:
    arguments = ("verify", "logits", models["reference"], models["wrong"], *OPTIONS, "--no-baseline")
    loose = ("--preset", "int4", "--max-expert-error", "3", "--max-block-error", "3", "--max-kl", "5")
    looser = (
        "--min-top1",
        "0",
        "--min-top5",
        "0",
        "--max-free-kl",
        "9",
        "--max-perplexity-rise",
        "9",
        "--max-router-error",
        "1",
    )
    assert dsv3(*arguments, *loose, *looser).code == 0
    missed = dsv3(*arguments, *loose, *looser, "--max-kl", "1e-9")
    assert missed.code == 4
    assert "expected at most 1e-09 (preset int4)" in missed.error_line


def test_a_report_is_not_written_over_a_model(dsv3, models) -> None:
    config = models["bf16"] / "config.json"
    before = config.read_bytes()
    arguments = ("verify", "logits", models["reference"], models["bf16"], *OPTIONS)
    for place in (config, "/dev/full"):
        outcome = dsv3(*arguments, "--report", place)
        assert outcome.code == 2
    assert config.read_bytes() == before


def test_without_plotly_it_says_so_at_once(dsv3, models, tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "plotly", None)
    outcome = dsv3(
        "verify", "logits", models["reference"], models["bf16"], "--report", tmp_path / "page.html"
    )
    assert outcome.code == 2
    assert "pip install 'dsv3-tools[report]'" in outcome.error_line


def test_tokens_from_a_file(dsv3, models, tmp_path: Path) -> None:
    save_file({"tokens": torch.arange(60).view(2, 30)}, tmp_path / "tokens.safetensors")
    arguments = ("verify", "logits", models["reference"], models["bf16"], "--no-baseline")
    outcome = dsv3(*arguments, "--tokens", tmp_path / "tokens.safetensors", "--json")
    assert outcome.code == 0
    document = outcome.document
    assert (document["num_sequences"], document["length"]) == (2, 30)
