"""One flipped bit anywhere in a result is found by `verify integrity`."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import wait

import pytest

from dsv3_tools import verify_integrity
from dsv3_tools.verify import integrity

FLIPS = 334  # for each of three results


def flip(path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_untouched_result(case, tmp_path):
    case.convert(tmp_path / "out")
    report = verify_integrity(tmp_path / "out")
    assert report.passed
    assert report.hashes_from == "manifest"
    assert report.files_hashed == len(case.expected) - 2  # manifest and card are not in it


def test_every_flipped_bit_is_found(case, tmp_path, chance, monkeypatch):
    # The pauses in which a signal would get its turn are longer than the work.
    monkeypatch.setattr(integrity, "wait_for", lambda tasks, _: wait(tasks))
    out = tmp_path / "out"
    case.convert(out)
    files = sorted(path for path in out.iterdir() if path.name != "README.md")
    for number in range(FLIPS):
        # A third by size, so mostly tensors; a third over the files alike; a third in what each begins with.
        by_size = [path.stat().st_size for path in files]
        path = chance.choices(files, by_size if number % 3 == 0 else None)[0]
        size = path.stat().st_size
        bit = chance.randrange(8 * (min(size, 4000) if number % 3 == 2 else size))
        flip(path, bit)
        report = verify_integrity(out, workers=2)
        assert not report.passed, f"{path.name}, bit {bit}"
        assert any(path.name in problem for problem in report.problems), f"{path.name}, bit {bit}"
        flip(path, bit)
    assert verify_integrity(out).passed


@pytest.mark.parametrize("damage", ["truncated", "extended", "removed", "added", "swapped"])
def test_other_damage(case, tmp_path, damage):
    out = tmp_path / "out"
    case.convert(out)
    one, two = sorted(out.glob("*.safetensors"))[:2]
    if damage == "truncated":
        os.truncate(one, one.stat().st_size - 1)
    elif damage == "extended":
        os.truncate(one, one.stat().st_size + 1)
    elif damage == "removed":
        one.unlink()
    elif damage == "added":
        shutil.copy(one, out / "model-00009-of-000009.safetensors")
    else:
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)
    assert not verify_integrity(out).passed
