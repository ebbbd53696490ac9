"""Every kind of fault has its exit code and one line; `--json` has one document, whatever happens.

The codes are those of the docstring of `dsv3_tools.errors`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest

from dsv3_tools import errors
from dsv3_tools.cli import app
from dsv3_tools.cli.options import SIZE

INDEX = "model.safetensors.index.json"


class Places:
    """What the commands below are about: `@word` is made by the method of that name, in an empty folder."""

    def __init__(self, fp8: Path, bf16: Path, folder: Path) -> None:
        self._fp8, self._bf16, self._folder = fp8, bf16, folder

    def resolve(self, command: str) -> list[str]:
        """Returns the command's words, with a path for every `@word` or `@word/name`."""
        words = []
        for word in command.split():
            name, _, rest = word.removeprefix("@").partition("/")
            words.append(str(getattr(self, name)() / rest) if word.startswith("@") else word)
        return words

    def fp8(self) -> Path:
        return self._fp8

    def bf16(self) -> Path:
        return self._bf16

    def new(self) -> Path:
        return self._folder / "new"

    def empty(self) -> Path:
        (self._folder / "empty").mkdir()
        return self._folder / "empty"

    def file(self) -> Path:
        (self._folder / "file").write_text("")
        return self._folder / "file"

    def full(self) -> Path:
        (self._folder / "full").mkdir()
        (self._folder / "full" / "notes.txt").write_text("mine")
        return self._folder / "full"

    def llama(self) -> Path:
        copy = self._copy(self._fp8)
        (copy / "config.json").write_text('{"model_type": "llama"}')
        return copy

    def unindexed(self) -> Path:
        copy = self._copy(self._fp8)
        (copy / INDEX).unlink()
        return copy

    def garbage(self) -> Path:
        copy = self._copy(self._fp8)
        (copy / "model-00002-of-000004.safetensors").write_text("garbage")
        return copy

    def unscaled(self) -> Path:
        """Without the scales of a weight, which planning must notice."""
        copy = self._copy(self._fp8)
        for path in (*copy.glob("*.safetensors"), copy / INDEX):
            name = b"self_attn.o_proj.weight_scale_inv"
            path.write_bytes(path.read_bytes().replace(name, name.replace(b"o_proj", b"p_proj")))
        return copy

    def flipped(self) -> Path:
        """With one bit of one weight changed since it was written."""
        copy = self._copy(self._bf16)
        shard = copy / "model-00002-of-000004.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        return copy

    def tokens(self) -> Path:
        np.save(self._folder / "tokens.npy", np.arange(12))
        return self._folder / "tokens.npy"

    def _copy(self, source: Path) -> Path:
        return Path(shutil.copytree(source, self._folder / "copy"))


FAULTS: dict[str, tuple[int, str]] = {
    "unknown command": (2, "convrt"),
    "unknown option": (2, "inspect @fp8 --colour"),
    "missing argument": (2, "convert fp8-to-bf16 @fp8"),
    "extra argument": (2, "inspect @fp8 @bf16"),
    "no workers": (2, "convert fp8-to-bf16 @fp8 @new --workers 0"),
    "bad size": (2, "convert fp8-to-bf16 @fp8 @new --max-shard-size x"),
    "bad choice": (2, "convert fp8-to-bf16 @fp8 @new --nonfinite drop"),
    "bad device": (2, "convert fp8-to-bf16 @fp8 @new --device tpu"),
    "no such GPU": (2, "convert fp8-to-bf16 @fp8 @new --device cuda:99"),
    "no such GPU, dry run": (2, "convert fp8-to-bf16 @fp8 @new --device cuda:99 --dry-run"),
    "onto itself": (2, "convert fp8-to-bf16 @fp8 @fp8"),
    "into itself": (2, "convert fp8-to-bf16 @fp8 @fp8/sub"),
    "contradiction": (2, "convert bf16-to-fp8 @bf16 @new --like @fp8 --scale-fmt ue8m0"),
    "pattern of nothing": (2, "quantize int8 @fp8 @new --include nothing"),
    "half of a pair": (2, "quantize int8 @fp8 @new --exclude *.self_attn.q_a_proj"),
    "GPTQ with zero points": (2, "quantize int4 @fp8 @new --layout gptq --asymmetric"),
    "group size of 16": (2, "quantize int4 @fp8 @new --group-size 16"),
    "FP8 as INT4": (3, "convert int4-to-bf16 @fp8 @new"),
    "BF16 as INT8": (3, "convert int8-to-bf16 @bf16 @new"),
    "INT4 onto files": (5, "quantize int4 @fp8 @full --group-size 32"),
    "a split to nowhere": (2, "split-mtp @fp8"),
    "a split into one place": (2, "split-mtp @fp8 --main @new --mtp @new"),
    "a split into itself": (2, "split-mtp @fp8 --main @fp8/sub"),
    "unknown MTP layout": (2, "split-mtp @fp8 --mtp @new --layout eagle"),
    "a split onto files": (5, "split-mtp @fp8 --main @new --mtp @full"),
    "a split onto files, dry run": (5, "split-mtp @fp8 --main @new --mtp @full --dry-run"),
    "a split of garbage": (3, "split-mtp @garbage --main @new"),
    "a merge with itself": (2, "merge-mtp @fp8 @fp8 @new"),
    "a second MTP module": (3, "merge-mtp @fp8 @bf16 @new"),
    "a merge of garbage": (3, "merge-mtp @fp8 @garbage @new"),
    "negative seed": (2, "sample @new --seed -1"),
    "too many shards": (2, "sample @new --shards 100000"),
    "unknown preset": (2, "sample @new --preset gpt-2"),
    "unknown engine": (2, "check @fp8 --engine ollama"),
    "no ranks": (2, "check @fp8 --tp 0"),
    "not there": (3, "inspect @new"),
    "a file": (3, "inspect @fp8/config.json"),
    "empty directory": (3, "convert fp8-to-bf16 @empty @new"),
    "other model": (3, "inspect @llama"),
    "no index": (3, "inspect @unindexed"),
    "garbage shard": (3, "convert fp8-to-bf16 @garbage @new"),
    "no scales": (3, "convert fp8-to-bf16 @unscaled @new"),
    "no scales, dry run": (3, "convert fp8-to-bf16 @unscaled @new --dry-run"),
    "already BF16": (3, "convert fp8-to-bf16 @bf16 @new"),
    "already FP8": (3, "convert bf16-to-fp8 @fp8 @new"),
    "--like of BF16": (3, "convert bf16-to-fp8 @bf16 @new --like @bf16"),
    "integrity of nothing": (3, "verify integrity @new"),
    "check of nothing": (3, "check @new --engine vllm"),
    "check of garbage": (3, "check @garbage"),
    "tensors of nothing": (3, "verify tensors @fp8 @new"),
    "tensors of garbage": (3, "verify tensors @garbage @fp8"),
    "structure of nothing": (3, "verify structure @new"),
    "logits of nothing": (3, "verify logits @fp8 @new --tokens @tokens"),
    "logits of garbage": (3, "verify logits @garbage @fp8 --tokens @tokens"),
    "logits without a tokenizer": (3, "verify logits @fp8 @bf16"),
    "logits of no tokens": (3, "verify logits @fp8 @bf16 --tokens @new/tokens.npy"),
    "logits of some file": (2, "verify logits @fp8 @bf16 --tokens @fp8/config.json"),
    "an MTP module of nothing": (3, "verify mtp @fp8 --mtp @new --tokens @tokens"),
    "no drafts": (2, "verify mtp @fp8 --tokens @tokens --drafts 0"),
    "tokens and text": (2, "verify logits @fp8 @bf16 --tokens @tokens --text @tokens"),
    "an impossible limit": (2, "verify logits @fp8 @bf16 --tokens @tokens --min-top1 99"),
    "logits on a TPU": (2, "verify logits @fp8 @bf16 --tokens @tokens --device tpu"),
    "a report nowhere": (5, "verify logits @fp8 @bf16 --tokens @tokens --report @new/page.html"),
    "half a weight": (2, "verify tensors @fp8 @bf16 --sample 1.5"),
    "a sample of words": (2, "verify tensors @fp8 @bf16 --sample some"),
    "exact, but not quite": (2, "verify tensors @fp8 @bf16 --exact --min-snr 3"),
    "tensors on a TPU": (2, "verify tensors @fp8 @bf16 --device tpu"),
    "structure of garbage": (4, "verify structure @garbage"),
    "structure without scales": (4, "verify structure @unscaled --no-data"),
    "another weight": (4, "verify tensors @fp8 @flipped"),
    "tensors without scales": (4, "verify tensors @fp8 @unscaled"),
    "an MTP module of noise": (4, "verify mtp @fp8 --tokens @tokens --min-acceptance 1"),
    "other logits": (4, "verify logits @fp8 @flipped --tokens @tokens"),
    "engine refuses": (4, "check @unscaled --engine vllm"),
    "flipped bit": (4, "verify integrity @flipped"),
    "not empty": (5, "convert fp8-to-bf16 @fp8 @full"),
    "not empty, dry run": (5, "convert fp8-to-bf16 @fp8 @full --dry-run"),
    "destination is a file": (5, "convert fp8-to-bf16 @fp8 @file"),
    "destination below a file": (5, "convert fp8-to-bf16 @fp8 @file/sub"),
    "not writable": (5, "convert fp8-to-bf16 @fp8 /proc/dsv3"),
    "sample onto a file": (5, "sample @file"),
    "sample onto files": (5, "sample @fp8"),
}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    paths = sorted(folder.rglob("*"))
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


@pytest.fixture
def fault(
    request: pytest.FixtureRequest, fp8_checkpoint: Path, bf16_checkpoint: Path, tmp_path: Path
) -> tuple[int, list[str]]:
    code, command = FAULTS[request.param]
    return code, Places(fp8_checkpoint, bf16_checkpoint, tmp_path).resolve(command)


@pytest.mark.parametrize("fault", FAULTS, indirect=True)
def test_fault(dsv3, fault: tuple[int, list[str]], fp8_checkpoint: Path, tmp_path: Path) -> None:
    code, command = fault
    before = snapshot(tmp_path), snapshot(fp8_checkpoint)
    outcome = dsv3(*command)
    assert outcome.code == code, outcome
    assert len(outcome.error_line) > len("dsv3: ") + 10
    assert (snapshot(tmp_path), snapshot(fp8_checkpoint)) == before


@pytest.mark.parametrize("fault", FAULTS, indirect=True)
def test_fault_as_json(dsv3, fault: tuple[int, list[str]]) -> None:
    code, command = fault
    outcome = dsv3(*command, "--json")
    assert outcome.code == code
    if code == 4:
        assert outcome.error_line
        assert outcome.document["passed"] is False
        assert outcome.document["problems"]
        return
    assert outcome.document["exit_code"] == code
    assert f"dsv3: {outcome.document['error']['message']}" == outcome.error_line
    assert outcome.document["error"]["kind"].isidentifier()


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_fault_in_a_process(dsv3_process, code: int, fp8_checkpoint, bf16_checkpoint, tmp_path: Path) -> None:
    """The same in the shell's eyes, one of each code."""
    name = next(name for name in reversed(FAULTS) if FAULTS[name][0] == code)
    places = Places(fp8_checkpoint, bf16_checkpoint, tmp_path)
    outcome = dsv3_process(*places.resolve(FAULTS[name][1]))
    assert outcome.code == code
    assert outcome.error_line


def test_no_fault(dsv3, fp8_checkpoint: Path, bf16_checkpoint: Path) -> None:
    """Negative control: what the faults were made from has none."""
    for command in (["inspect", fp8_checkpoint], ["inspect", bf16_checkpoint]):
        assert (dsv3(*command).code, dsv3(*command).err) == (0, "")
    outcome = dsv3("verify", "integrity", bf16_checkpoint)
    assert (outcome.code, outcome.err) == (0, "")


def test_debug_shows_the_traceback(dsv3, tmp_path: Path) -> None:
    plain, debug = dsv3("inspect", tmp_path), dsv3("inspect", tmp_path, "--debug")
    assert "Traceback" not in plain.err
    assert "Traceback (most recent call last)" in debug.err
    assert (plain.code, debug.code) == (3, 3)
    assert debug.err.splitlines()[-1] == plain.error_line


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("odd\nthing"), 1, r"unexpected RuntimeError: odd\nthing; run with --debug"),
        (OSError(24, "Too many open files"), 1, "ulimit -n"),
        (MemoryError(), 1, "fewer --workers"),
        (errors.Interrupted(signal.SIGTERM, "stopped"), 143, "stopped"),
        (errors.Interrupted(signal.SIGHUP, "stopped"), 129, "stopped"),
        (click.exceptions.Abort(), 130, "interrupted"),
        (errors.FormatError("a"), 3, "a"),
        (errors.PlanError("here", ["a", "b"]), 3, "here: 2 problems: a; b"),
        (errors.Dsv3Error("a"), 1, "a"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_exceptions_become_codes(
    dsv3, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str, as_json: bool
) -> None:
    @click.command("inspect")
    @click.option("--json", "as_json", is_flag=True)
    def failing(as_json: bool) -> None:
        raise error

    monkeypatch.setitem(app.dsv3.commands, "inspect", failing)
    outcome = dsv3("inspect", *(["--json"] if as_json else []))
    assert outcome.code == code
    assert said in outcome.error_line
    if as_json:
        assert outcome.document["exit_code"] == code


SLOW = """
import signal
# Whoever started the tests may ignore some (nohup does); a run would respect that.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
import sys, time
from dsv3_tools.conversion.progress import Meter
real = Meter.add
def add(self, nbytes, *, shards=0):
    print("ready", flush=True)
    time.sleep(0.1)
    real(self, nbytes, shards=shards)
Meter.add = add
from dsv3_tools.cli import main
main()
"""


def stopped(command: list[str], signum: int) -> tuple[int, str, float]:
    """Runs a command slowly, sends a signal once it is at work; returns its code, stderr and last seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        began = time.monotonic()
        os.kill(process.pid, signum)
        _, stderr = process.communicate(timeout=20)
    return process.returncode, stderr, time.monotonic() - began


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("signum", "code"), SIGNALS, ids=str)
def test_a_signal_stops_a_run_which_then_goes_on(
    dsv3, fp8_checkpoint: Path, bf16_checkpoint: Path, tmp_path: Path, signum: int, code: int
) -> None:
    command = ["convert", "fp8-to-bf16", str(fp8_checkpoint), str(tmp_path / "out"), "--workers", "1"]
    found, stderr, seconds = stopped(command, signum)
    assert found == code
    assert seconds < 10
    assert "Traceback" not in stderr
    assert f"to go on, run again: dsv3 {' '.join(command)}" in stderr
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert dsv3(*command).code == 0
    for path in bf16_checkpoint.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_signal_stops_verify_integrity(bf16_checkpoint: Path) -> None:
    code, stderr, _ = stopped(["verify", "integrity", str(bf16_checkpoint), "--workers", "1"], signal.SIGTERM)
    assert code == 143
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("5000000000", 5 * 10**9),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("4GiB", 4 * 2**30),
        ("1.5KiB", 1536),
        ("2.5MB", 2_500_000),
        ("7B", 7),
        ("1TB", 10**12),
        ("1tib", 2**40),
        ("9007199254740993", 9007199254740993),
        ("0.3kb", 300),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert SIZE.convert(text, None, None) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GB", "-1", "-5GB", "0.5B", "5G", "GB", "1e9", "1,5GB", "5GB5", "0x10", "inf", "9" * 400],
)
def test_sizes_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size such as 5GB"):
        SIZE.convert(text, None, None)


def test_problems_are_shortened() -> None:
    message = str(errors.PlanError("here", [f"p{n}" for n in range(50)]))
    assert message.startswith("here: 50 problems: p0; p1; ")
    assert message.endswith("p19; and 30 more")
    assert json.dumps(message).isascii()
