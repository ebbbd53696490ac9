"""`split-mtp` against copying the same files: both move every byte once and wait for the disk.

    python benchmarks/split_mtp.py
    python benchmarks/split_mtp.py --folder /dev/shm --experts 64

The sample has DeepSeek-V3's shapes, three MoE layers and the MTP layer, and a small vocabulary: comparing the
copies of embedding and head would take a share of the time that it has in no real checkpoint. The page cache
is warm. SHA-256 of every file is part of a split.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

import dsv3_tools


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="/tmp")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(arguments.folder) / "dsv3-bench-split"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        overrides = {"first_k_dense_replace": 0, "vocab_size": 2048}
        made = dsv3_tools.sample(
            folder / "source", layers=3, experts=arguments.experts, shards=8, overrides=overrides
        )
        copies, splits = [], []
        for _ in range(1 + arguments.rounds):
            copies.append(timed(lambda: copy(folder / "source", folder / "copy")))
            splits.append(timed(lambda: split(folder)))
            for name in ("copy", "main", "mtp"):
                shutil.rmtree(folder / name)
        ratios = [one / other for one, other in zip(splits[1:], copies[1:], strict=True)]
        print(
            f"{made.nbytes / 1e9:.2f} GB: copying {statistics.median(copies[1:]):.2f} s, "
            f"split-mtp {statistics.median(splits[1:]):.2f} s, ratio {statistics.median(ratios):.2f} "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
        )
    finally:
        shutil.rmtree(folder)


def timed(work: object) -> float:
    assert callable(work)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy(source: Path, destination: Path) -> None:
    destination.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, destination / path.name)
        descriptor = os.open(destination / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def split(folder: Path) -> None:
    dsv3_tools.split_mtp(folder / "source", main=folder / "main", mtp=folder / "mtp", device="cpu")


if __name__ == "__main__":
    main()
