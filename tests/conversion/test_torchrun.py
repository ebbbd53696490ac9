"""Several processes started by torchrun: the bytes of one, and one fate for all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, sys
sys.argv[0] = "dsv3"
if os.environ.get("FAIL_IN_RANK") == os.environ["RANK"]:
    real = os.pwrite
    def full(descriptor, data, offset):
        if offset:
            raise OSError(28, os.strerror(28))
        return real(descriptor, data, offset)
    os.pwrite = full
from dsv3_tools.cli import main
main()
"""


def torchrun(case, out, tmp_path, *, fail_in: int | None = None) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["--redirects", "0:0,1:0", str(script), *case.arguments(out)]
    failing = {} if fail_in is None else {"FAIL_IN_RANK": str(fail_in)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, value in failing.items():
            patch.setenv(name, value)
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_write_what_one_does(cases, tools, tmp_path):
    case = cases["fp8-to-bf16"]
    run = torchrun(case, tmp_path / "out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), case.expected)


def test_failure_in_one_of_two(cases, tools, tmp_path):
    """Rank 0 says what went wrong in rank 1; both end; one process goes on from there."""
    case, out = cases["bf16-to-fp8-like"], tmp_path / "out"
    run = torchrun(case, out, tmp_path, fail_in=1)
    assert run.returncode != 0
    assert "rank 1: " in run.stderr
    assert "No space left on device" in run.stderr
    # torchrun may end the second process while it is on its way out with the same code.
    assert "exitcode  : 5" in run.stderr, run.stderr
    assert not tools.violations(out, case.expected)
    kept = tools.journalled(out)
    result = tools.convert_quickly(case, out)
    assert result.shards_resumed == len(kept)
    assert not tools.is_same(tools.snapshot(out), case.expected)


def test_refusal_by_rank_0_ends_both(cases, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    run = torchrun(cases["fp8-to-bf16"], out, tmp_path)
    assert run.returncode != 0
    assert "is not empty (notes.txt)" in run.stderr
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


MIXED = """
import os, sys
sys.argv[0] = "dsv3"
sys.argv[3] = sys.argv[3] + os.environ["RANK"]
from dsv3_tools.cli import main
main()
"""


def test_ranks_with_different_sources_are_refused(cases, tools, tmp_path):
    """Node-local copies of two revisions: the result would be a mix that nothing else notices."""
    case, script = cases["fp8-to-bf16"], tmp_path / "script.py"
    for rank in "01":
        shutil.copytree(case.source, tmp_path / f"source{rank}")
    os.utime(tmp_path / "source1" / "model-00001-of-000003.safetensors", (1, 1))
    script.write_text(MIXED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(script), "convert", "fp8-to-bf16", str(tmp_path / "source"), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode != 0
    assert "the ranks' plans differ" in run.stderr
    assert not (tmp_path / "out").exists()


SLOW = """
import os, sys, time
sys.argv[0] = "dsv3"
real = os.pwrite
def slow(descriptor, data, offset):
    if os.environ["RANK"] == "1" and offset:
        raise OSError(28, os.strerror(28))
    time.sleep(0.4 if offset else 0)
    return real(descriptor, data, offset)
os.pwrite = slow
from dsv3_tools.cli import main
main()
"""


def test_a_failing_rank_stops_the_others_soon(cases, tmp_path):
    """Rank 0 alone would need minutes; it stops within seconds of rank 1's failure and says why."""
    case, script = cases["fp8-to-bf16"], tmp_path / "script.py"
    script.write_text(SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(script), *case.arguments(tmp_path / "out")]
    began = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode != 0
    assert "rank 1: " in run.stderr
    assert time.monotonic() - began < 30
