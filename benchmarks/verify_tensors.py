"""Times `verify tensors` against reading both checkpoints once, and against the plain way in torch.

    python benchmarks/verify_tensors.py                    2 workers, about 1.1 GB of FP8, 5 rounds
    python benchmarks/verify_tensors.py --experts 8 --rounds 3

One MoE layer of DeepSeek-V3's shapes with random weights, page cache warm. Reading takes as many threads as
there are workers, each with one buffer of 4 MiB that it reads both sides' files into, and does nothing else
with them. "torch" decodes a whole weight on either side with this project's definitions in torch
(`kernels/reference*.py`) and compares the two, with as many threads within its operations; it is timed on
a few weights and scaled by their bytes. All take turns within a round: medians, and medians of the ratios.
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
from dsv3_tools.conversion.planning import read_stored

BLOCK_NBYTES = 4 << 20
PIECE_NBYTES = 64 << 20
NUM_TORCH = 6

CANDIDATES: dict[str, Callable[[Path, Path], object]] = {
    "FP8, a copy": shutil.copytree,
    "BF16": lambda fp8, out: dsv3_tools.convert_fp8_to_bf16(fp8, out, device="cpu"),
    "INT8 channel": lambda fp8, out: dsv3_tools.quantize_int8(fp8, out, device="cpu"),
    "INT4 g128": lambda fp8, out: dsv3_tools.quantize_int4(fp8, out, device="cpu", scale_search="absmax"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="/tmp", help="where the checkpoints are written")
    parser.add_argument("--experts", type=int, default=20, help="of 44 million parameters each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.workers)
    folder = Path(arguments.folder) / "dsv3-bench-verify"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        shape = {"first_k_dense_replace": 0, "vocab_size": 1024, "num_nextn_predict_layers": 0}
        dsv3_tools.sample(folder / "FP8", layers=1, experts=arguments.experts, shards=2, overrides=shape)
        CANDIDATES["BF16"](folder / "FP8", folder / "BF16")
        print("| candidate, against FP8 | bytes | read | verify tensors | over reading | torch | over ours |")
        print("|---|---|---|---|---|---|---|")
        for name, make in CANDIDATES.items():
            candidate = folder / name
            if not candidate.exists():
                make(folder / "FP8", candidate)
            print(row(name, folder / "FP8", candidate, arguments.workers, arguments.rounds))
            if name != "BF16":
                shutil.rmtree(candidate)
    finally:
        shutil.rmtree(folder)


def row(name: str, reference: Path, candidate: Path, workers: int, rounds: int) -> str:
    read_all(reference, candidate, workers)
    report = dsv3_tools.verify_tensors(reference, candidate, workers=workers, sample=3)  # compiles
    seconds: dict[str, list[float]] = {"read": [], "ours": [], "torch": []}
    for _ in range(rounds):
        seconds["read"].append(timed(lambda: read_all(reference, candidate, workers)))
        began = time.perf_counter()
        report = dsv3_tools.verify_tensors(reference, candidate, workers=workers)
        seconds["ours"].append(time.perf_counter() - began)
        assert report.passed, report.problems[0]
        seconds["torch"].append(plain(reference, candidate, report.nbytes))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    over = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["read"], strict=True))
    slower = statistics.median(a / b for a, b in zip(seconds["torch"], seconds["ours"], strict=True))
    return (
        f"| {name} | {report.nbytes / 1e9:.2f} GB | {median['read']:.2f} s | {median['ours']:.2f} s | "
        f"{over:.2f} | {median['torch']:.1f} s | {slower:.1f} |"
    )


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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


def plain(reference: Path, candidate: Path, nbytes: int) -> float:
    """Returns the seconds that plain torch would take for all bytes, from those for a few weights."""
    seconds, done = 0.0, 0
    with dsv3_tools.Checkpoint(reference) as ours, dsv3_tools.Checkpoint(candidate) as theirs:
        stored = [{w.full_name: w for w in read_stored(side).weights} for side in (ours, theirs)]
        names = [name for name in stored[0] if ".experts." in name][:NUM_TORCH]
        for name in names:
            began = time.perf_counter()
            a, b = (
                in_torch(side, weights[name]) for side, weights in zip((ours, theirs), stored, strict=True)
            )
            error = (a - b).square().sum()
            ratio = a.square().sum() / error
            assert float(ratio) > 50 or not bool(torch.isfinite(ratio))
            seconds += time.perf_counter() - began
            for side, weights in zip((ours, theirs), stored, strict=True):
                done += sum(side.specs[part].nbytes for part in weights[name].parts.values())
    return seconds * nbytes / done


def in_torch(checkpoint: dsv3_tools.Checkpoint, weight) -> torch.Tensor:  # type: ignore[no-untyped-def]
    from dsv3_tools.kernels import reference, reference_integer

    parts = {part: checkpoint.read(name) for part, name in weight.parts.items()}
    if weight.format.name == "fp8_block":
        return reference.dequantize_fp8_block(parts["weight"], parts["weight_scale_inv"], dtype=torch.float32)
    if weight.format.name == "int8_channel":
        return reference_integer.dequantize_int8_channel(
            parts["weight"], parts["weight_scale"], dtype=torch.float32
        )
    if weight.format.name == "int4_packed":
        return reference_integer.dequantize_int4_group(
            parts["weight_packed"], parts["weight_scale"], dtype=torch.float32
        )
    return parts["weight"].float()


if __name__ == "__main__":
    main()
