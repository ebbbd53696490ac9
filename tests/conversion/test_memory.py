"""Peak memory is bounded by the number of workers alone, whatever the size of shards and tensors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np

import dsv3_tools

MB = 10**6
WIDTH = 2048
PEAK = """
import json, os, sys
os.fsync = lambda _: None  # waiting for the disk takes no memory
import dsv3_tools
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
warm_up, source, out, workers = sys.argv[1:]
dsv3_tools.convert_fp8_to_bf16(warm_up, out + "-warm-up", device="cpu", workers=int(workers))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
dsv3_tools.convert_fp8_to_bf16(source, out, device="cpu", workers=int(workers))
print(json.dumps(status("VmHWM") - before))
"""


def make_large(tools, folder, rows: int):
    """Makes a sparse checkpoint with right scales: embedding of `rows`, FP8 weights of half as many."""
    sizes = {
        "hidden_size": WIDTH,
        "vocab_size": rows,
        "intermediate_size": rows // 2,
        "tie_word_embeddings": True,
    }
    tools.make(folder, layers=1, shards=2, overrides=sizes, sparse=True)
    with dsv3_tools.Checkpoint(folder) as checkpoint:
        places = [
            (*checkpoint.location(name), spec.num_elements)
            for name, spec in checkpoint.specs.items()
            if name.endswith("_scale_inv")
        ]
    for shard, offset, count in places:
        with (folder / shard).open("r+b") as file:
            file.seek(offset)
            file.write(np.full(count, 1e-4, dtype="<f4").tobytes())
    return folder


def peak_nbytes(tools, small, tmp_path, *, rows: int, workers: int) -> int:
    """Returns the peak above a process that has converted a tiny checkpoint, after one of `rows`."""
    source, out = make_large(tools, tmp_path / "source", rows), tmp_path / "out"
    command = [sys.executable, "-c", PEAK, *map(str, [small, source, out, workers])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (out / tools.index).exists()
    for folder in (source, out, tmp_path / "out-warm-up"):
        shutil.rmtree(folder)
    return json.loads(run.stdout)


def test_peak_memory(tools, cases, tmp_path):
    """Doubling the tensors changes nothing, a second worker adds its own."""
    rows = 50_000
    largest = 2 * rows * WIDTH * 2
    small = cases["fp8-to-bf16"].source
    one = peak_nbytes(tools, small, tmp_path, rows=rows, workers=1)
    doubled = peak_nbytes(tools, small, tmp_path, rows=2 * rows, workers=1)
    two = peak_nbytes(tools, small, tmp_path, rows=2 * rows, workers=2)
    assert doubled < one + 32 * MB
    assert max(one, doubled) < min(512 + 256, 0.5 * largest / MB) * MB
    assert two < min(2 * 512 + 256, 0.5 * largest / MB) * MB
