"""Counts what it takes to look at DeepSeek-V3 on the Hub and to plan a conversion, without one weight.

    python benchmarks/hub_headers.py

The release's headers over holes, 688.6 GB in 163 shards, served by the hub of the tests in this process. Its
hashes are made up: to calculate them would take ten minutes, and nobody asks for them here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dsv3_tools

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.hub.repos import Blob
from tests.hub.server import FakeHub

REPO = "deepseek-ai/DeepSeek-V3"


def main() -> None:
    Blob.sha256 = property(lambda blob: hashlib.sha256(str(blob.source).encode()).hexdigest())
    with tempfile.TemporaryDirectory() as name, FakeHub() as hub:
        folder = Path(name)
        dsv3_tools.sample(folder / "v3", sparse=True)
        hub.add_repo(REPO, {path.name: path for path in (folder / "v3").iterdir() if path.is_file()})
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        out = str(folder / "out")
        for words in (["inspect", REPO], ["convert", "fp8-to-bf16", REPO, out, "--dry-run"]):
            hub.forget()
            began = time.perf_counter()
            program = Path(sys.executable).with_name("dsv3")
            # A dry run ends with 5 where the disk has no room for the result: it has planned it all the same.
            done = subprocess.run(
                [program, *words], env={**os.environ, **home}, capture_output=True, check=False
            )
            assert done.returncode in (0, 5), done.stderr
            seconds, megabytes = time.perf_counter() - began, hub.nbytes_sent / 1e6
            print(f"{words[0]}: {megabytes:.1f} MB in {len(hub.requests)} requests, {seconds:.1f} s")


if __name__ == "__main__":
    main()
