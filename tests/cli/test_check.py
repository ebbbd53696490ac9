"""`dsv3 check`: exit codes 0, 2, 3 and 4, the text, and the one JSON document."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import dsv3_tools
from dsv3_tools import errors
from dsv3_tools.engines import ENGINES

INDEX = "model.safetensors.index.json"


def test_an_engine_that_loads_it(dsv3, miniature: Path) -> None:
    outcome = dsv3("check", miniature, "--engine", "vllm")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"vllm: loads (rules for {ENGINES['vllm'].version})\n"


def test_an_engine_that_does_not(dsv3, miniature: Path) -> None:
    outcome = dsv3("check", miniature, "--engine", "vllm-ascend")
    assert outcome.code == 4
    lines = outcome.out.splitlines()
    assert lines[0] == "vllm-ascend: would not load (rules for 0.23)"
    assert lines[1].startswith("  refused: config.json: FP8 blocks: vllm-ascend has it for DeepSeek-V4 only")
    assert lines[2] == "    format, from vllm-ascend 0.23 (read)"
    assert outcome.error_line.startswith(f"dsv3: {miniature}: vllm-ascend would not load it: config.json: ")


def test_an_engine_that_misreads_it(dsv3, miniature: Path) -> None:
    outcome = dsv3("check", miniature, "--engine", "transformers")
    assert outcome.code == 4
    assert outcome.out.startswith("transformers: would be misread (")
    assert "  note: config.json: FP8 blocks: transformers keeps FP8 only on a GPU" in outcome.out


def test_a_table_of_all(dsv3, miniature: Path) -> None:
    outcome = dsv3("check", miniature)
    assert (outcome.code, outcome.err) == (0, "")
    rows = outcome.out.splitlines()[1:-1]
    assert [row.split()[0] for row in rows] == list(ENGINES)
    assert {row.split()[0] for row in rows if row.split()[1] == "loads"} == {
        "vllm",
        "sglang",
        "lmdeploy",
        "tensorrt-llm",
        "lightllm",
    }


def test_too_many_ranks(dsv3, miniature: Path) -> None:
    outcome = dsv3("check", miniature, "--engine", "sglang", "--tp", 2)
    assert outcome.code == 4
    assert "mlp.shared_experts.down_proj: 128 columns over 2 ranks are 64" in outcome.out


@pytest.mark.parametrize("arguments", [("--engine", "ollama"), ("--tp", "0"), ("--tp", "x")])
def test_usage(dsv3, miniature: Path, arguments: tuple[str, ...]) -> None:
    assert dsv3("check", miniature, *arguments).code == 2


def test_no_checkpoint(dsv3, tmp_path: Path) -> None:
    assert dsv3("check", tmp_path).code == 3


def test_json_of_one(dsv3, miniature: Path) -> None:
    outcome = dsv3("check", miniature, "--engine", "vllm-ascend", "--json")
    document = outcome.document
    assert (outcome.code, document["passed"], document["engine"], document["tp"]) == (
        4,
        False,
        "vllm-ascend",
        1,
    )
    (verdict,) = document["verdicts"].values()
    assert verdict["loads"] is False
    assert document["problems"] == [p["message"] for p in verdict["problems"] if p["severity"] != "note"]
    assert {"rule", "severity", "message", "source"} == verdict["problems"][0].keys()


def test_json_of_all(dsv3, miniature: Path) -> None:
    outcome = dsv3("check", miniature, "--json")
    assert (outcome.code, outcome.document["passed"], outcome.document["problems"]) == (0, True, [])
    assert list(outcome.document["verdicts"]) == list(ENGINES)


def test_an_index_without_metadata(dsv3, bf16_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bf16_checkpoint, tmp_path / "copy"))
    assert dsv3("check", copy, "--engine", "transformers").code == 0
    document = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({"weight_map": document["weight_map"]}))
    outcome = dsv3("check", copy, "--engine", "transformers")
    assert outcome.code == 4
    assert "has no metadata" in outcome.error_line


def test_what_our_own_conversion_writes_loads_everywhere_but_in_the_demo(bf16_checkpoint: Path) -> None:
    report = dsv3_tools.check(bf16_checkpoint)
    assert {name for name, found in report.verdicts.items() if not found.loads} == {"deepseek-infer"}


def test_the_function_refuses_what_the_command_refuses(miniature: Path) -> None:
    with pytest.raises(errors.UsageError, match="engine 'ollama': not known, expected one of vllm, "):
        dsv3_tools.check(miniature, engine="ollama")
    with pytest.raises(errors.UsageError, match="tp: got 0"):
        dsv3_tools.check(miniature, tp=0)
