"""A calibrated run on two GPUs writes the bytes of one, wherever hidden states are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3_tools

pytestmark = [pytest.mark.gpu]

SCRIPT = """
import sys
import dsv3_tools
from dsv3_tools.conversion.ranks import Ranks
source, out, memory = sys.argv[1:]
dsv3_tools.quantize_int4(
    source, out, method="gptq", device="cuda", ranks=Ranks.join(), save_every=2, memory=int(memory) or None
)
"""


def hashes(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "dsv3_manifest.json").read_bytes())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.fixture(scope="module")
def one(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "one"
    dsv3_tools.quantize_int4(miniature, out, method="gptq", device="cuda:0")
    return out


@pytest.mark.multi_gpu
@pytest.mark.parametrize("memory", [0, 1])
def test_two_processes(miniature: Path, one: Path, tmp_path: Path, memory: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(tmp_path / "script.py"), str(miniature), str(tmp_path / "two"), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hashes(tmp_path / "two") == hashes(one)


@pytest.mark.multi_gpu
def test_the_other_gpu(miniature: Path, one: Path, tmp_path: Path) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "out", method="gptq", device="cuda:1")
    assert hashes(tmp_path / "out") == hashes(one)


def test_hidden_states_in_a_file(miniature: Path, one: Path, tmp_path: Path) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "out", method="gptq", device="cuda:0", memory=1)
    assert hashes(tmp_path / "out") == hashes(one)


def test_hidden_states_in_host_memory(
    miniature: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv3_tools.quantize import calibrator

    monkeypatch.setattr(calibrator, "choose_place", lambda *_: "host")
    dsv3_tools.quantize_int4(miniature, tmp_path / "out", method="gptq", device="cuda:0")
    assert hashes(tmp_path / "out") == hashes(one)


def test_int8(miniature: Path, tmp_path: Path) -> None:
    dsv3_tools.quantize_int8(miniature, tmp_path / "out", method="gptq", device="cuda:0")
    report = json.loads((tmp_path / "out" / "dsv3_quantization.json").read_bytes())
    gains = [line["gain"] for line in report["summary"]]
    assert sum(gains) / len(gains) > 1.0
    assert dsv3_tools.verify_tensors(miniature, tmp_path / "out").passed
