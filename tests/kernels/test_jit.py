"""Compiled code kept on disk is never older than the files that it was made of."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dsv3_tools.kernels import jit

USER = """
from fresh.cpu_shared import number
from fresh.jit import cached

@cached
def answer():
    return number()
"""
SHARED = """
from fresh.jit import inlined

@inlined
def number():
    return {}
"""


def load(folder: Path, number: int, *, omit: str = "", append: str = "") -> ModuleType:
    """Imports a package around the project's `jit.py`, with a line more or less, as a new process would."""
    package = folder / "fresh"
    package.mkdir(exist_ok=True)
    lines = Path(jit.__file__).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not omit or omit not in line]
    assert len(kept) == len(lines) - bool(omit)
    (package / "__init__.py").write_text("")
    (package / "jit.py").write_text("".join(kept) + append)
    (package / "cpu_shared.py").write_text(SHARED.format(number))
    (package / "cpu_user.py").write_text(USER)
    for name in [name for name in sys.modules if name.split(".")[0] == "fresh"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    return importlib.import_module("fresh.cpu_user")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    # Python's own cache tells files apart by size and second only.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def test_unchanged_files_are_compiled_once(folder: Path) -> None:
    assert load(folder, 1).answer() == 1
    again = load(folder, 1)
    assert again.answer() == 1
    assert sum(again.answer.stats.cache_hits.values()) == 1


def test_a_change_of_a_shared_file_is_noticed(folder: Path) -> None:
    assert load(folder, 1).answer() == 1
    changed = load(folder, 2)
    assert changed.answer() == 2
    assert not changed.answer.stats.cache_hits


def test_a_change_of_the_compiler_options_is_noticed(folder: Path) -> None:
    load(folder, 1).answer()
    changed = load(folder, 1, append="# another option\n")
    changed.answer()
    assert not changed.answer.stats.cache_hits


def test_without_the_digest_no_change_is_noticed(folder: Path) -> None:
    """numba alone runs the stale code: what the digest is for, and proof that the tests above can fail."""
    omit = "function.__qualname__ +="
    assert load(folder, 1, omit=omit).answer() == 1
    assert load(folder, 2, omit=omit).answer() == 1
