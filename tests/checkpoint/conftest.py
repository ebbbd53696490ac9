from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.corruptions import make_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right checkpoint that no test writes to."""
    path = tmp_path_factory.mktemp("pristine") / "model"
    make_checkpoint(path)
    return path


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A right checkpoint for one test to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model", symlinks=True))
