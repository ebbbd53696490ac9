"""Compares two checkpoints tensor by tensor, byte by byte: the library in a few lines.

python examples/same_bytes.py FIRST SECOND
"""

from __future__ import annotations

import hashlib
import sys

from dsv3_tools import Checkpoint


def main(first: str, second: str) -> int:
    """Prints how many tensors are the same; returns 1 if any differs."""
    with Checkpoint(first) as one, Checkpoint(second) as other:
        if one.specs.keys() != other.specs.keys():
            print(f"the names differ: {sorted(one.specs.keys() ^ other.specs.keys())[:5]}")
            return 1
        digest = hashlib.sha256()
        for name, spec in sorted(one.specs.items()):
            data = one.read_bytes(name)
            if spec != other.specs[name] or data != other.read_bytes(name):
                print(f"{name} differs")
                return 1
            digest.update(data)
        print(f"all {len(one.specs)} tensors, {one.nbytes:,} bytes, are byte-identical")
        print(f"SHA-256 over all of them: {digest.hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
