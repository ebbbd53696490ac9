"""The SHA-256 of what the shipped model becomes, to compare between devices and machines.

python benchmarks/hashes.py cpu cuda
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import dsv3_tools

MODEL = Path(__file__).parents[1] / "miniature" / "checkpoint"


def main(devices: list[str]) -> None:
    for device in devices:
        with tempfile.TemporaryDirectory() as folder:
            bf16, fresh, ue8m0, like = (Path(folder) / name for name in ("bf16", "fp8", "ue8m0", "like"))
            dsv3_tools.convert_fp8_to_bf16(MODEL, bf16, device=device)
            dsv3_tools.convert_bf16_to_fp8(bf16, fresh, device=device)
            dsv3_tools.convert_bf16_to_fp8(bf16, ue8m0, scale_fmt="ue8m0", device=device)
            dsv3_tools.convert_bf16_to_fp8(bf16, like, like=MODEL, device=device)
            for path in (MODEL, bf16, fresh, ue8m0, like):
                name = "source" if path is MODEL else path.name
                print(f"{device:5} {name:7} {digest(path)}", flush=True)


def digest(path: Path) -> str:
    """SHA-256 over every tensor, in the order of names."""
    total = hashlib.sha256()
    with dsv3_tools.Checkpoint(path) as checkpoint:
        for name in sorted(checkpoint.specs):
            total.update(checkpoint.read_bytes(name))
    return total.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:] or ["cpu"])
