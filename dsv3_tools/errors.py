"""The exceptions of dsv3-tools, and the exit code that each one means.

    Dsv3Error                  base of everything that is raised on purpose
    ├── CheckpointError        a directory or file is not what it claims to be     exit 3
    │   └── HeaderError        malformed safetensors header                        exit 3
    ├── FormatError            tensors do not satisfy a format                     exit 3
    ├── PlanError              outputs and inputs do not add up                    exit 3
    ├── UsageError             options that contradict each other                  exit 2
    ├── DestinationError       disk full, not writable, locked, another run's      exit 5
    │                          leftovers
    ├── VerificationFailed     the check ran and the answer is no                  exit 4
    ├── NetworkError           the Hub could not be reached, or refused            exit 7
    └── Interrupted            a signal asked the run to stop                      exit 128 + signal

A message is one line: *where: what is wrong, got X, expected Y (why); what to do*.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "DestinationError",
    "Dsv3Error",
    "FormatError",
    "HeaderError",
    "Interrupted",
    "NetworkError",
    "PlanError",
    "UsageError",
    "VerificationFailed",
    "join_problems",
]

MAX_PROBLEMS_SHOWN = 20


class Dsv3Error(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class CheckpointError(Dsv3Error):
    """A directory or file is not what it claims to be."""

    exit_code = 3


class HeaderError(CheckpointError):
    """A safetensors header is malformed."""


class FormatError(Dsv3Error):
    """Tensors do not satisfy the format they are said to be in."""

    exit_code = 3


class PlanError(Dsv3Error):
    """The inputs and outputs of a conversion do not add up.

    `problems` holds every problem found, each a line of its own; the message shows the first ones.
    """

    exit_code = 3

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{where}: {join_problems(self.problems)}")


class UsageError(Dsv3Error):
    """Options contradict each other or make no sense for this checkpoint."""

    exit_code = 2


class DestinationError(Dsv3Error):
    """The destination cannot be written: disk, permission, lock, or another run's leftovers."""

    exit_code = 5


class VerificationFailed(Dsv3Error):
    """A check ran to its end and the answer is no."""

    exit_code = 4


class NetworkError(Dsv3Error):
    """The Hub could not be reached, or did not do what it was asked; later it may."""

    exit_code = 7


class Interrupted(Dsv3Error):
    """A signal asked the run to stop; everything finished so far is kept for a resume."""

    def __init__(self, signum: int, message: str) -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(message)


def join_problems(problems: Sequence[str]) -> str:
    """Returns `problems` as one line, shortened after the first twenty."""
    if len(problems) == 1:
        return problems[0]
    shown = "; ".join(problems[:MAX_PROBLEMS_SHOWN])
    rest = len(problems) - MAX_PROBLEMS_SHOWN
    return f"{len(problems)} problems: {shown}" + (f"; and {rest} more" if rest > 0 else "")
