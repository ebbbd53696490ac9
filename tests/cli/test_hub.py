"""Commands over models on the Hub, as a shell sees them: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.hub.client import environment
from tests.hub.faults import Fault, Rule
from tests.hub.server import TOKEN, FakeHub

Run = Callable[..., Outcome]


@pytest.fixture
def model(hub: FakeHub, client: None, fp8_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The small FP8 checkpoint as a model, and a user who may write to `me`."""
    hub.add_repo("org/small", {path.name: path for path in fp8_checkpoint.iterdir()})
    hub.organizations.add("me")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return "org/small"


def test_a_model_is_inspected(dsv3: Run, model: str, fp8_checkpoint: Path) -> None:
    local, remote = (json.loads(dsv3("inspect", at, "--json").out) for at in (fp8_checkpoint, model))
    assert remote["directory"].startswith("hf://org/small@")
    assert remote["parameters"] == local["parameters"]
    assert dsv3("inspect", f"hf://{model}").out.startswith("hf://org/small@")


def test_a_dry_run_says_what_comes(dsv3: Run, model: str, hub: FakeHub, tmp_path: Path) -> None:
    outcome = dsv3("convert", "fp8-to-bf16", model, tmp_path / "out", "--dry-run", "--push", "me/out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "to fetch from the Hub: " in outcome.out
    assert "to be uploaded to hf://me/out@main, and kept here" in outcome.out
    assert not (tmp_path / "out").exists()
    assert {seen.method for seen in hub.requests} == {"GET", "HEAD"}
    planned = dsv3("convert", "fp8-to-bf16", model, tmp_path / "out", "--dry-run", "--json").out
    assert 0 < json.loads(planned)["nbytes_staged"] <= json.loads(planned)["nbytes_to_fetch"]


def test_there_and_back(dsv3: Run, model: str, hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert dsv3("convert", "fp8-to-bf16", model, out).code == 0
    pushed = dsv3("push", out, "me/out")
    assert (pushed.code, pushed.err) == (0, "")
    assert f"uploaded: {hub.url}/me/out, commit " in pushed.out
    again = json.loads(dsv3("push", out, "me/out", "--json").out)
    assert again["nbytes_there"] > 0.9 * again["nbytes"]
    assert "README.md" in again["files"]
    assert dsv3("verify", "integrity", "me/out").code == 0
    assert dsv3("verify", "tensors", model, "me/out").code == 0


def test_nothing_is_left_here(dsv3: Run, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("quantize", "int8", model, out, "--push", "me/out", "--no-keep-output")
    first = dsv3(*command)
    assert (first.code, first.err) == (0, "")
    assert "uploaded: hf://me/out@" in first.out
    assert "verify integrity" not in first.out
    assert "already complete" in dsv3(*command).out
    inspected = dsv3("inspect", out)
    assert (inspected.code, inspected.out) == (3, "")
    assert "its shards went to the Hub and were removed" in inspected.err
    kept = dsv3("quantize", "int8", model, out)
    assert kept.code == 5
    assert "what was left of a result that went to hf://me/out@" in kept.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("inspect", "org/none"), 3, "the Hub has no such model"),
        (("inspect", "org/small@none"), 3, "no such revision"),
        (("inspect", "hf:org/small"), 2, "a model on the Hub is named"),
        (("inspect", "hf://small"), 2, "is no model on the Hub"),
        (("inspect", "org/a--b"), 2, "no name that a model on the Hub can have"),
        (("convert", "fp8-to-bf16", "org/small", "hf://me/out"), 2, "is on the Hub, expected a directory"),
        (("split-mtp", "org/small", "--main", "hf://me/out"), 2, "is on the Hub, expected a directory"),
        (("convert", "fp8-to-bf16", "org/small", "OUT", "--no-keep-output"), 2, "asks for --push"),
        (("convert", "fp8-to-bf16", "org/small", "OUT", "--push", "out"), 2, "is no model on the Hub"),
        (("convert", "fp8-to-bf16", "org/small", "OUT", "--push", "org/small"), 5, "holds another model"),
        (
            ("convert", "fp8-to-bf16", "org/small", "OUT", "--push", "other/out"),
            7,
            "a token that may do this",
        ),
        (("push", "OUT", "me/out"), 3, "does not exist"),
        (("card", "OUT"), 3, "has no dsv3_manifest.json"),
    ],
)
def test_refusals(
    dsv3: Run, model: str, tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    places = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    for extra in ((), ("--json",)):
        outcome = dsv3(*places, *extra)
        assert outcome.code == code
        assert said in outcome.err
        assert outcome.err.count("\n") == 1
        assert TOKEN not in outcome.err + outcome.out
    assert not (tmp_path / "out").exists()


def test_the_network_fails(dsv3: Run, model: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [Rule(Fault.status(503), method="GET", path="/cdn/*", times=None)]
    outcome = dsv3("convert", "fp8-to-bf16", model, tmp_path / "out", "--json")
    assert outcome.code == 7
    assert json.loads(outcome.out)["error"]["kind"] == "NetworkError"


@pytest.mark.parametrize("what", ["headers", "shards", "upload"])
def test_a_signal_ends_what_is_slow(
    model: str, hub: FakeHub, hub_home: Path, bf16_checkpoint: Path, tmp_path: Path, what: str
) -> None:
    """Downloads and uploads alike, with threads of huggingface_hub that cannot be stopped."""
    words = ["push", str(bf16_checkpoint), "me/out"]
    if what != "upload":
        words = ["convert", "fp8-to-bf16", model, str(tmp_path / "out")]
    hub.rate = 3e3 if what == "headers" else 30e3
    with subprocess.Popen(
        [sys.executable, "-c", "from dsv3_tools.cli import main; main()", *words],
        env=environment(hub.url, hub_home, token=TOKEN),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wanted = {"headers": "model-", "shards": "/cdn/", "upload": "/lfs/"}[what]
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and not any(wanted in seen.path for seen in hub.requests):
            time.sleep(0.05)
            if what == "upload" and any("batch" in seen.path for seen in hub.requests):
                break
        time.sleep(0.5)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        try:
            _, err = process.communicate(timeout=15)
        finally:
            process.kill()
        assert time.monotonic() - began < 10
        assert process.returncode == 128 + signal.SIGINT, err
        assert "Traceback" not in err
