"""What is said of a calibrated run: its card, checks of its result, forecasts, notes, refusals."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import dsv3_tools
from dsv3_tools.cli.app import run_command_line
from dsv3_tools.errors import UsageError
from dsv3_tools.quantize.forecast import Matrices, UnitSpeeds, forecast, measure
from dsv3_tools.quantize.states import available_memory, choose_place


@pytest.fixture(scope="module")
def result(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, calibrated with a little text."""
    out = tmp_path_factory.mktemp("said") / "out"
    dsv3_tools.quantize_int4(miniature, out, method="gptq", device="cpu", max_tokens=2560, length=256)
    return out


def test_card(result: Path) -> None:
    card = (result / "README.md").read_text()
    assert "calibrated (gptq) with 10 x 256 tokens, without training" in card
    command = next(line for line in card.splitlines() if line.startswith("dsv3 quantize"))
    words = shlex.split(command)
    for option, value in (("--method", "gptq"), ("--damping", "0.01"), ("--dtype", "F32")):
        assert words[words.index(option) + 1] == value
    assert words[words.index("--calibration") + 1] == "TOKENS"
    assert "--scale-search" not in words
    assert (
        json.loads((result / "dsv3_manifest.json").read_bytes())["options"]["calibration"]["tokens"]["sha256"]
        in card
    )


def test_tensors_of_a_calibrated_result(miniature: Path, result: Path, tmp_path: Path) -> None:
    assert dsv3_tools.verify_tensors(miniature, result).passed
    (result / "dsv3_quantization.json").rename(tmp_path / "away")
    try:  # the control: without it, they are taken for codes that are not the nearest
        assert not dsv3_tools.verify_tensors(miniature, result).passed
    finally:
        (tmp_path / "away").rename(result / "dsv3_quantization.json")
    found = dsv3_tools.verify_tensors(miniature, result, sample=4)
    assert found.passed


def test_logits_on_the_calibration_tokens_are_flattering(miniature: Path, result: Path) -> None:
    note = "the tokens that the checkpoint was calibrated with"
    same = dsv3_tools.verify_logits(
        miniature, result, max_tokens=2560, length=256, baseline=False, device="cpu"
    )
    assert any(note in one for one in same.notes)
    other = dsv3_tools.verify_logits(
        miniature, result, max_tokens=512, length=256, baseline=False, device="cpu"
    )
    assert not any(note in one for one in other.notes)


class Said(NamedTuple):
    """What a command has said."""

    exit_code: int
    output: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command line."""

    def act(*words: Any) -> Said:
        code = run_command_line([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return act


def test_inspect_shows_it(run: Any, result: Path) -> None:
    shown = run("inspect", result)
    assert "calibrated: gptq, 10 x 256 tokens, 1 of the sequences held out" in shown.output
    assert "experts.down_proj" in shown.output
    found = json.loads(run("inspect", result, "--json").output)["calibration"]
    assert {line["kind"] for line in found} == {"experts.gate_up", "experts.down_proj"}


def test_dry_run(run: Any, tiny: Path, tokens: Path, tmp_path: Path) -> None:
    words = ["quantize", "int4", tiny, tmp_path / "out", "--method", "gptq", "--calibration", tokens]
    words += ["--device", "cpu", "--group-size", "32", "--dry-run"]
    shown = run(*words)
    assert shown.exit_code == 0, shown.output
    assert "calibration with tokens.npy, 12 x 40 tokens: about " in shown.output
    assert not (tmp_path / "out").exists()
    found = json.loads(run(*words, "--json").output)["calibration"]
    assert found["seconds"] > 0
    assert found["states_nbytes"] == 12 * 40 * 128 * 4


def test_json_of_a_run(run: Any, tiny: Path, tokens: Path, tmp_path: Path) -> None:
    words = ["quantize", "int4", tiny, tmp_path / "out", "--method", "gptq", "--calibration", tokens]
    done = run(*words, "--device", "cpu", "--group-size", "32", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert document["calibration"][0]["num_matrices"] == 24
    assert (
        "saw fewer tokens than"
        in run(*words, "--device", "cpu", "--group-size", "32", "--overwrite", "--max-tokens", "80").stderr
    )


OPTIONS = {
    "--dtype F32": "--method rtn has no use for it",
    "--length 64": "--method rtn has no use for it",
    "--memory 1GB": "--method rtn has no use for it",
    "--damping 0.02": "--method rtn has no use for it",
    "--save-every 2": "--method rtn has no use for it",
    "--method gptq --scale-search absmax": "chooses scales by the inputs",
    "--method rtn-weighted --damping 0.02": "has no use for it",
    "--method gptq --nonfinite keep": "cannot go on over NaN",
    "--method gptq --calibration tokens.csv": "got a .csv file",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_without_a_use(run: Any, tiny: Path, tmp_path: Path, options: str) -> None:
    found = run("quantize", "int4", tiny, tmp_path / "out", *options.split(), "--device", "cpu")
    assert found.exit_code == 2
    assert OPTIONS[options] in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_on_the_hub_is_downloaded_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hf download org/name"):
        dsv3_tools.quantize_int4("hf://org/name", tmp_path / "out", method="gptq", device="cpu")


def test_forecast_grows_as_the_work_does(v3: Path) -> None:
    with dsv3_tools.Checkpoint(v3) as checkpoint:
        dims = checkpoint.config
    weights = [Matrices(4096, 7168, 14848, True), Matrices(7168, 2048, 14848, True)]
    speeds = UnitSpeeds(products=350e12, factor=16e12, columns=2e13)
    said: dict[str, Any] = {
        "num_layers": 62,
        "states_place": "device",
        "value_nbytes": 2,
        "disk_nbytes": 10**12,
        "speeds": speeds,
        "is_gptq": True,
        "device_type": "cuda",
    }
    one = forecast(dims, weights=weights, tokens=512 * 2048, world_size=1, **said)
    two = forecast(dims, weights=weights, tokens=512 * 2048, world_size=2, **said)
    few = forecast(dims, weights=weights, tokens=64 * 2048, world_size=1, **said)
    assert 600 < one.seconds < 2700
    assert two.seconds < 0.6 * one.seconds
    assert few.seconds < one.seconds
    assert few.factor_seconds == one.factor_seconds
    assert one.states_nbytes == 512 * 2048 * 7168 * 2
    assert one.device_nbytes < 70e9


def test_measure_and_places() -> None:
    cpu = torch.device("cpu")
    with torch.no_grad():
        speeds = measure(cpu, torch.float32, 128)
    assert min(speeds.products, speeds.factor, speeds.columns) > 0
    assert choose_place(10, cpu, None, 1) == "host"
    assert choose_place(available_memory() * 2, cpu, None, 1) == "file"
    assert choose_place(100, cpu, 99, 1) == "file"
    assert choose_place(int(available_memory() * 0.4), cpu, None, 2) == "file"


def test_two_dimensions_are_sequences(tiny: Path, tmp_path: Path) -> None:
    """Rows stay rows, whatever their number; a single one cannot be held out."""
    np.save(tmp_path / "one.npy", np.arange(100)[None] % 160)
    with pytest.raises(UsageError, match="expected at least 2"):
        dsv3_tools.quantize_int4(
            tiny, tmp_path / "out", method="gptq", calibration=tmp_path / "one.npy", device="cpu"
        )
