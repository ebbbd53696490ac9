"""`verify logits` on layers of DeepSeek-V3's shapes: time against reading both models, and GPU memory.

    python benchmarks/verify_logits.py                              one GPU, FP8 against BF16, in /dev/shm
    python benchmarks/verify_logits.py --device cuda:0 --device cuda:0,1
    python benchmarks/verify_logits.py --device cpu --layers 1 --experts 16 --tokens 128

The weights are random; the candidate is the reference's conversion. The floor is reading the bytes of both
models' layers, in blocks of 16 MiB, into pinned memory and on to the device, by as many threads. Five runs
of the models go through every layer (three of them in float32 on a GPU, which is slow there: `--no-baseline`
leaves two of those out).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from forward import read_all

import dsv3_tools
from dsv3_tools import Checkpoint
from dsv3_tools.model.cores import reading_threads
from dsv3_tools.model.parallel import RankGroup


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", action="append")
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(arguments.folder) / "dsv3-bench-logits"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        overrides = {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "vocab_size": 8192}
        dsv3_tools.sample(
            folder / "fp8", layers=arguments.layers, experts=arguments.experts, overrides=overrides
        )
        dsv3_tools.convert_fp8_to_bf16(folder / "fp8", folder / "bf16")
        ids = np.random.default_rng(0).integers(8192, size=(max(1, arguments.tokens // 1024), 1024))
        np.save(folder / "tokens.npy", ids[:, : min(1024, arguments.tokens)])
        print("| device | runs | s, median | read both, s | ratio | peak GPU memory | passed |")
        print("|---|---|---|---|---|---|---|")
        for device in arguments.device or ["cuda:0"]:
            for baseline in (False, True):
                measure(folder, device, baseline=baseline, rounds=arguments.rounds)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, device: str, *, baseline: bool, rounds: int) -> None:
    """Prints a row of the table; the first round, which compiles kernels, does not count."""
    seconds, reads, passed = [], [], True
    first = torch.device(device.partition(",")[0])
    for _ in range(1 + rounds):
        if first.type == "cuda":
            torch.cuda.reset_peak_memory_stats(first)
        report = dsv3_tools.verify_logits(
            folder / "fp8", folder / "bf16", tokens=folder / "tokens.npy", device=device, baseline=baseline
        )
        seconds.append(report.seconds)
        passed &= report.passed
        if "," not in device:
            reads.append(sum(read(folder / name, first) for name in ("fp8", "bf16")))
    peak = torch.cuda.max_memory_allocated(first) / 1e9 if reads and first.type == "cuda" else 0.0
    took = statistics.median(seconds[1:])
    floor = statistics.median(reads[1:]) if reads else float("nan")
    print(
        f"| {device} | {5 if baseline else 3} | {took:.2f} | {floor:.2f} | {took / floor:.2f} "
        f"| {peak:.1f} GB | {passed} |",
        flush=True,
    )


def read(directory: Path, device: torch.device) -> float:
    with Checkpoint(directory) as checkpoint:
        began = time.perf_counter()
        read_all(checkpoint, RankGroup(), device, reading_threads(device.type))
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
