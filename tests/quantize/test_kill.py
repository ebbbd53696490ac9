"""Calibrated runs killed at any write: a run that follows gives the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import dsv3_tools
from dsv3_tools.checkpoint import durable
from dsv3_tools.checkpoint.manifest import QUANTIZATION_NAME
from dsv3_tools.conversion.workspace import Workspace

NAMES = ("pwrite", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
KILLED = 9


def quantize(source: Path, out: Path, tokens: Path, **options: Any) -> Any:
    given = {"method": "gptq", "device": "cpu", "group_size": 32, "save_every": 1, "workers": 1, **options}
    return dsv3_tools.quantize_int4(source, out, calibration=tokens, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def in_child(source: Path, out: Path, tokens: Path, at: int) -> int:
    """Runs in a fork that ends, like a kill, before the write of this number; returns its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0

    def counted(real: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os._exit(KILLED)
            return real(*args, **keywords)

        return call

    for name in NAMES:
        setattr(os, name, counted(getattr(os, name)))
    try:
        quantize(source, out, tokens)
        os._exit(0)
    except BaseException:  # nothing of pytest may run in the fork
        os._exit(1)


@pytest.fixture(scope="module")
def expected(tiny: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    quantize(tiny, out, tokens)
    return files(out)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_any_write(tiny: Path, tokens: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Each time a little later, on what the last one has left: it is done at last, and never wrong before."""
    out, code, kills = tmp_path / "out", KILLED, 0
    for at in range(3, 400, 23):
        code = in_child(tiny, out, tokens, at)
        if code == 0:
            break
        assert code == KILLED
        kills += 1
        if (out / "model.safetensors.index.json").exists():
            here = files(out)
            assert {name: here[name] for name in here if name != "README.md"}.items() <= expected.items()
    assert kills > 3
    quantize(tiny, out, tokens)
    assert files(out) == expected
    assert not (out / ".dsv3").exists()


def test_killed_while_it_cleans_up(
    tiny: Path, tokens: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan goes before the figures: without a plan the result is complete, and its report stays."""
    out = tmp_path / "out"

    def only_the_plan(workspace: Workspace) -> None:
        (workspace.folder / "plan.json").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "remove", only_the_plan)
        quantize(tiny, out, tokens)
    shutil.rmtree(out / ".dsv3" / "made")
    assert quantize(tiny, out, tokens).already_complete
    assert files(out) == expected


def test_without_its_figures_a_run_does_not_end(
    tiny: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: figures that are gone are not left out of the report."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("dsv3_tools.conversion.executor.finish", _full)
        with pytest.raises(OSError, match="full"):
            quantize(tiny, out, tokens)
    (out / ".dsv3" / "made" / "layer-2.json").unlink()
    with pytest.raises(dsv3_tools.errors.DestinationError, match="figures of 1 layers are gone"):
        quantize(tiny, out, tokens)


def _full(*_: Any) -> None:
    raise OSError("full")


def test_what_is_half_written_is_removed(
    tiny: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("dsv3_tools.quantize.calibrator.save_states", _full)
        with pytest.raises(OSError, match="full"):
            quantize(tiny, out, tokens)
    left = out / ".dsv3" / "made" / "states-1.safetensors.states.x.tmp"
    left.write_bytes(b"half")
    seen = []
    real = durable.create_temporary
    monkeypatch.setattr(
        "dsv3_tools.checkpoint.writer.create_temporary",
        lambda *args: (seen.append(left.exists()), real(*args))[1],
    )
    quantize(tiny, out, tokens)
    assert not any(seen)


def test_a_report_does_not_outlive_its_weights(tiny: Path, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny, out, tokens)
    (out / "dsv3_manifest.json").unlink()  # as if killed before it was written
    dsv3_tools.quantize_int4(tiny, out, device="cpu", group_size=32, overwrite=True)
    assert not (out / QUANTIZATION_NAME).exists()


def test_saved_states_are_checked(
    tiny: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flipped bit in them would change all that follows."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("dsv3_tools.conversion.executor.finish", _full)
        with pytest.raises(OSError, match="full"):
            quantize(tiny, out, tokens)
    (saved,) = (out / ".dsv3" / "made").glob("states-*.safetensors")
    number = int(saved.stem.split("-")[1])
    data = bytearray(saved.read_bytes())
    data[-9] ^= 1
    saved.write_bytes(data)
    journal = out / ".dsv3" / "journal.jsonl"
    lines = [line for line in journal.read_text().splitlines() if line]
    last = [line for line in lines if json.loads(line)["shard"].startswith(f"model-{number + 2:05d}-")]
    assert last
    journal.write_text("\n".join(line for line in lines if line not in last))
    with pytest.raises(dsv3_tools.errors.CheckpointError, match="SHA-256"):
        quantize(tiny, out, tokens)
