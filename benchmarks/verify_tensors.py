"""Times `verify tensors` against reading both checkpoints once.

    python benchmarks/verify_tensors.py                    2 workers, about 2.5 GB of FP8, 9 rounds
    python benchmarks/verify_tensors.py --cold --rounds 3  every file out of the page cache before each run

One MoE layer of DeepSeek-V3's shapes with random weights. Reading takes as many threads as there are workers,
each with one buffer of 4 MiB that it reads both sides' files into, and does nothing else with them. Both take
turns within a round: medians, and medians of the ratios. GB/s are of the bytes of both sides.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dsv3_tools

BLOCK_NBYTES = 4 << 20
PIECE_NBYTES = 64 << 20
COLUMNS = ("reference", "candidate", "bytes", "read", "GB/s", "verify tensors", "GB/s", "over reading")

PAIRS: dict[tuple[str, str], Callable[[Path, Path], object]] = {
    ("FP8", "FP8, a copy"): shutil.copytree,
    ("FP8", "BF16"): lambda fp8, out: dsv3_tools.convert_fp8_to_bf16(fp8, out, device="cpu"),
    ("FP8", "INT8 block"): lambda fp8, out: dsv3_tools.quantize_int8(fp8, out, device="cpu", scheme="block"),
    ("FP8", "INT8 channel"): lambda fp8, out: dsv3_tools.quantize_int8(fp8, out, device="cpu"),
    ("FP8", "INT4 g128"): lambda fp8, out: dsv3_tools.quantize_int4(
        fp8, out, device="cpu", scale_search="absmax"
    ),
    ("BF16", "INT8 channel"): lambda bf16, out: dsv3_tools.quantize_int8(bf16, out, device="cpu"),
    ("BF16", "FP8, ue8m0"): lambda bf16, out: dsv3_tools.convert_bf16_to_fp8(
        bf16, out, device="cpu", scale_fmt="ue8m0"
    ),
}
"""How each candidate is made of its reference."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="/tmp", help="where the checkpoints are written")
    parser.add_argument("--experts", type=int, default=48, help="of 44 million parameters each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cold", action="store_true", help="with nothing in the page cache")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.workers)
    folder = Path(arguments.folder) / "dsv3-bench-verify"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        shape = {"first_k_dense_replace": 0, "vocab_size": 1024, "num_nextn_predict_layers": 0}
        dsv3_tools.sample(folder / "FP8", layers=1, experts=arguments.experts, shards=2, overrides=shape)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for (reference, candidate), make in PAIRS.items():
            sides = folder / reference, folder / candidate
            if not sides[1].exists():
                make(*sides)
            cells = measured(*sides, arguments.workers, arguments.rounds, cold=arguments.cold)
            print(f"| {' | '.join((reference, candidate, *cells))} |", flush=True)
            if candidate not in {name for name, _ in PAIRS}:
                shutil.rmtree(sides[1])
    finally:
        shutil.rmtree(folder)


def measured(reference: Path, candidate: Path, workers: int, rounds: int, *, cold: bool) -> list[str]:
    def prepare() -> None:
        if cold:
            forget(reference, candidate)

    def verify() -> None:
        report = dsv3_tools.verify_tensors(reference, candidate, workers=workers)
        assert report.passed, report.problems[0]

    report = dsv3_tools.verify_tensors(reference, candidate, workers=workers, sample=3)  # compiles
    read_all(reference, candidate, workers)
    reading, verifying = [], []
    for _ in range(rounds):
        prepare()
        reading.append(timed(lambda: read_all(reference, candidate, workers)))
        prepare()
        verifying.append(timed(verify))
    report = dsv3_tools.verify_tensors(reference, candidate, workers=workers)
    gigabytes = report.nbytes / 1e9
    cells = [f"{gigabytes:.2f} GB"]
    for seconds in map(statistics.median, (reading, verifying)):
        cells += [f"{seconds:.3f} s", f"{gigabytes / seconds:.1f}"]
    over = statistics.median(a / b for a, b in zip(verifying, reading, strict=True))
    return [*cells, f"{over:.2f}"]


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forget(*folders: Path) -> None:
    """Has the system drop the shards from its page cache."""
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # what is not on disk yet stays in the cache
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_all(reference: Path, candidate: Path, workers: int) -> None:
    """Reads every shard of both checkpoints, in pieces that the threads take in turn."""
    pieces = iter(
        [
            (path, start, min(PIECE_NBYTES, path.stat().st_size - start))
            for folder in (reference, candidate)
            for path in sorted(folder.glob("*.safetensors"))
            for start in range(0, path.stat().st_size, PIECE_NBYTES)
        ]
    )
    lock = threading.Lock()

    def loop() -> None:
        buffer = memoryview(bytearray(BLOCK_NBYTES))
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            path, start, nbytes = piece
            descriptor = os.open(path, os.O_RDONLY)
            done = 0
            while done < nbytes:
                done += os.preadv(descriptor, [buffer[: min(BLOCK_NBYTES, nbytes - done)]], start + done)
            os.close(descriptor)

    threads = [threading.Thread(target=loop) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
