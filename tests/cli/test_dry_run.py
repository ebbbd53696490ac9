"""`--dry-run` writes nothing, and what it says is what the run then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_tools.checkpoint.reader import Checkpoint

DIRECTIONS = ["fp8-to-bf16", "bf16-to-fp8", "like", "int8", "int4 --asymmetric", "int4 --rest=fp8 --mtp=drop"]
OPTIONS: list[list[str]] = [[], ["--max-shard-size", "100KB"], ["--workers", "1"]]


def command(direction: str, fp8: Path, bf16: Path, out: Path) -> list[str | Path]:
    if direction == "fp8-to-bf16":
        return ["convert", direction, fp8, out]
    if direction.startswith("int"):
        return (
            ["quantize", *direction.split(), fp8, out]
            if direction == "int8"
            else ["quantize", "int4", fp8, out, "--group-size", "32", *direction.split()[1:]]
        )
    return ["convert", "bf16-to-fp8", bf16, out, *(["--like", fp8] if direction == "like" else [])]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_plan_is_what_happens(
    dsv3, fp8_checkpoint: Path, bf16_checkpoint: Path, tmp_path: Path, direction: str, options: list[str]
) -> None:
    out = tmp_path / "out"
    line = [*command(direction, fp8_checkpoint, bf16_checkpoint, out), *options, "--device", "cpu"]
    outcome = dsv3(*line, "--dry-run", "--json")
    plan = outcome.document
    assert (outcome.code, outcome.err) == (0, "")
    assert list(tmp_path.iterdir()) == []

    assert dsv3(*line, "--dry-run").code == 0
    assert list(tmp_path.iterdir()) == []

    result = dsv3(*line, "--json").document
    check(plan, result, out)
    with Checkpoint(next(part for part in line if isinstance(part, Path))) as source:
        assert plan["tensors_in"] == len(source.specs)
        assert plan["nbytes_in"] == source.nbytes


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_plans_of_a_split_and_of_a_merge(
    dsv3, fp8_checkpoint: Path, tmp_path: Path, options: list[str]
) -> None:
    out = {half: tmp_path / half for half in ("main", "mtp", "whole")}
    halves: list[str | Path] = ["--main", out["main"], "--mtp", out["mtp"]]
    line: list[str | Path] = ["split-mtp", fp8_checkpoint, *halves, *options, "--device", "cpu"]
    plans = dsv3(*line, "--dry-run", "--json").document
    text = dsv3(*line, "--dry-run").out
    assert text.count("nothing was written (--dry-run)") == 2
    assert list(tmp_path.iterdir()) == []
    results = dsv3(*line, "--json").document
    assert plans.keys() == results.keys() == {"main", "mtp"}
    for half in plans:
        check(plans[half], results[half], out[half])
    assert dsv3(*line).out.count("already complete") == 2
    alone = dsv3("split-mtp", fp8_checkpoint, "--main", out["main"], *options, "--dry-run", "--json").document
    assert alone.keys() == {"main"}

    line = ["merge-mtp", out["main"], out["mtp"], out["whole"], *options, "--device", "cpu"]
    plan = dsv3(*line, "--dry-run", "--json").document
    assert not out["whole"].exists()
    check(plan, dsv3(*line, "--json").document, out["whole"])
    assert plan["nbytes_in"] == plans["main"]["nbytes_in"]


def check(plan: dict[str, Any], result: dict[str, Any], out: Path) -> None:
    with Checkpoint(out) as written:
        assert {shard["name"]: shard["nbytes"] for shard in plan["shards"]} == {
            path.name: path.stat().st_size for path in out.glob("*.safetensors")
        }
        assert plan["tensors_out"] == len(written.specs)
        assert plan["payload_nbytes_out"] == written.nbytes
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == plan["payload_nbytes_out"]
        assert index["metadata"]["total_parameters"] == plan["parameters"]
        changes = plan["changes"]
        assert sum(change["nbytes_after"] for change in changes) == written.nbytes
    assert plan["nbytes_out"] == result["nbytes_out"] == sum(s["nbytes"] for s in plan["shards"])
    assert plan["shards_to_write"] == result["shards_written"] == len(plan["shards"])
    assert plan["nbytes_to_write"] == plan["nbytes_out"]
    assert (plan["nbytes_in"], plan["operation"]) == (result["nbytes_in"], result["operation"])
    assert (plan["devices"], plan["workers"]) == (result["devices"], result["workers"])
    small = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    own = {"README.md", "config.json", "model.safetensors.index.json", "dsv3_manifest.json"}
    assert small == own | set(plan["copied_files"])
    assert plan["state"] == "fresh"


def test_a_finished_destination_is_recognised(dsv3, fp8_checkpoint: Path, bf16_checkpoint: Path) -> None:
    line = ["convert", "fp8-to-bf16", fp8_checkpoint, bf16_checkpoint]
    before = {path.name: path.stat().st_mtime_ns for path in bf16_checkpoint.iterdir()}
    plan = dsv3(*line, "--dry-run", "--json").document
    assert (plan["state"], plan["shards_to_write"], plan["nbytes_to_write"]) == ("complete", 0, 0)
    result = dsv3(*line, "--json").document
    assert result["already_complete"] is True
    assert result["shards_written"] == 0
    assert "already complete" in dsv3(*line).out
    assert {path.name: path.stat().st_mtime_ns for path in bf16_checkpoint.iterdir()} == before


def test_overwrite(dsv3, fp8_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00009-of-000009.safetensors").write_text("another checkpoint's")
    line = ["convert", "fp8-to-bf16", fp8_checkpoint, tmp_path / "out"]
    assert dsv3(*line, "--dry-run").code == 5
    assert dsv3(*line, "--dry-run", "--overwrite").code == 0
    assert (tmp_path / "out" / "model-00009-of-000009.safetensors").exists()
    assert dsv3(*line, "--overwrite").code == 0
    assert not (tmp_path / "out" / "model-00009-of-000009.safetensors").exists()
    assert dsv3("verify", "integrity", tmp_path / "out").code == 0


def test_not_enough_room(dsv3, monkeypatch: pytest.MonkeyPatch, fp8_checkpoint: Path, tmp_path: Path) -> None:
    from dsv3_tools.conversion import preflight

    monkeypatch.setattr(preflight, "free_nbytes", lambda _: 1000)
    for options in ([], ["--dry-run"], ["--dry-run", "--json"]):
        outcome = dsv3("convert", "fp8-to-bf16", fp8_checkpoint, tmp_path / "out", *options)
        assert outcome.code == 5
        assert "1,000 bytes are free, the run needs " in outcome.error_line
        assert list(tmp_path.iterdir()) == []


def test_what_stays_behind_is_said(dsv3, fp8_checkpoint: Path, copied, tmp_path: Path) -> None:
    source = copied(fp8_checkpoint)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (source / "assets").mkdir()
    line = ["convert", "fp8-to-bf16", source, tmp_path / "out"]
    plan = dsv3(*line, "--dry-run", "--json").document
    assert plan["left_behind"] == ["assets/", "pytorch_model.bin"]
    assert "tokenizer.json" in plan["copied_files"]
    assert "files left behind: assets/, pytorch_model.bin" in dsv3(*line, "--dry-run").out
