"""Times a conversion from the Hub against downloading the model first and converting it then.

    python benchmarks/hub.py                     loopback as fast as it goes, and at 300 MB/s; 3 rounds each
    python benchmarks/hub.py --rates 1000 100    at 1 GB/s and at 100 MB/s

One MoE layer of DeepSeek-V3's shapes with random FP8 weights in 40 shards, served by the hub of the tests in
a process of its own, without Xet. Both sides are commands in new processes with empty caches, take turns, and
write to the same disk: `dsv3 convert fp8-to-bf16 hf://org/model OUT` against `hf download org/model` and then
`dsv3 convert fp8-to-bf16 DIR OUT`. Medians, and the median of the ratios. The most bytes of source shards
that lay on disk during the one command are looked up every 10 ms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import dsv3_tools

REPO = "org/model"
COLUMNS = ("rate", "source", "download", "convert", "both", "from the Hub", "ratio", "most source on disk")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where everything is written")
    parser.add_argument("--experts", type=int, default=48, help="of 44 million parameters each")
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="*", default=[0, 300], help="MB/s; 0 is no limit")
    arguments = parser.parse_args()
    folder = Path(arguments.folder) / "dsv3-bench-hub"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        shape = {"first_k_dense_replace": 0, "vocab_size": 1024, "num_nextn_predict_layers": 0}
        size = {"layers": 1, "experts": arguments.experts, "shards": arguments.shards}
        dsv3_tools.sample(folder / "model", overrides=shape, **size)
        dsv3_tools.convert_fp8_to_bf16(folder / "model", folder / "warm", device="cpu")  # compiles
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for rate in arguments.rates:
            print(f"| {' | '.join(measured(folder, rate, arguments.rounds))} |", flush=True)
    finally:
        shutil.rmtree(folder)


def measured(folder: Path, rate: float, rounds: int) -> list[str]:
    downloading, converting, streaming, most = [], [], [], 0
    with served(folder / "model", rate) as url:
        for _ in range(rounds):
            one = command(folder, url, "hf", "download", REPO, "--local-dir", str(folder / "downloaded"))
            two = command(folder, url, "dsv3", *conversion(str(folder / "downloaded")), str(folder / "out"))
            downloading.append(one)
            converting.append(two)
            clean(folder)
            with watched(folder / "out") as seen:
                streaming.append(
                    command(folder, url, "dsv3", *conversion(f"hf://{REPO}"), str(folder / "out"))
                )
            most = max(most, seen[0])
            clean(folder)
    both = [a + b for a, b in zip(downloading, converting, strict=True)]
    ratio = statistics.median(a / b for a, b in zip(streaming, both, strict=True))
    nbytes = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    seconds = [f"{statistics.median(times):.1f} s" for times in (downloading, converting, both, streaming)]
    limit = f"{rate:g} MB/s" if rate else "loopback"
    return [limit, f"{nbytes / 1e9:.2f} GB", *seconds, f"{ratio:.2f}", f"{most / 1e9:.2f} GB"]


def conversion(source: str) -> list[str]:
    return ["convert", "fp8-to-bf16", source]


def clean(folder: Path) -> None:
    for name in ("downloaded", "out", "home"):
        shutil.rmtree(folder / name, ignore_errors=True)
    os.sync()


def command(folder: Path, url: str, *words: str) -> float:
    """Returns the seconds that a command takes, with nothing in its cache."""
    home = {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **home, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    program = Path(sys.executable).with_name(words[0])
    began = time.perf_counter()
    done = subprocess.run([program, *words[1:]], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    return seconds


@contextmanager
def served(model: Path, rate: float) -> Iterator[str]:
    """Yields the URL of a hub, in a process of its own, that has the model."""
    limit = ["--rate", str(rate * 1e6)] if rate else []
    words = [sys.executable, "-m", "tests.hub.server", str(model), "--repo", REPO, *limit]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@contextmanager
def watched(out: Path) -> Iterator[list[int]]:
    """Yields a list with the most bytes of source shards that lie beside a result."""
    most, done = [0], threading.Event()

    def look() -> None:
        folder = f"{out}/.dsv3/source-*/*"
        while not done.wait(0.01):
            names = glob(f"{folder}/*.safetensors") + glob(
                f"{folder}/.cache/huggingface/download/*.incomplete"
            )
            most[0] = max(most[0], sum(Path(name).stat().st_size for name in names if Path(name).exists()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def size_of(name: str) -> int:
    try:
        return os.stat(name).st_size
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    main()
