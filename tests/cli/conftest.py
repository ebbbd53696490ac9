"""Runs commands: in this process, or as a user's shell would."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsv3_tools.cli.app import run_command_line

COLOR_VARIABLES = {"CLICOLOR", "CLICOLOR_FORCE", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS"}


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on stdout, which must be the only thing there."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error_line(self) -> str:
        """The one line on stderr."""
        (line,) = self.err.splitlines()
        assert line.startswith("dsv3: "), line
        assert "Traceback" not in self.err
        return line


@pytest.fixture
def dsv3() -> Callable[..., Outcome]:
    """Runs a command in this process."""

    def run(*arguments: str | Path) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = run_command_line([str(argument) for argument in arguments])
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def dsv3_process() -> Callable[..., Outcome]:
    """Runs a command in a process of its own, without the colour settings of the test run."""

    def run(*arguments: str | Path, cwd: Path | None = None, **variables: str) -> Outcome:
        environment = {k: v for k, v in os.environ.items() if k not in COLOR_VARIABLES} | variables
        done = subprocess.run(
            [sys.executable, "-c", "from dsv3_tools.cli import main; main()", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environment,
            timeout=60,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
