"""What both kinds of `dsv3 quantize` share: a source opened, its calibration data read, and the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import SourceLike
from dsv3_tools.conversion.api import PathLike
from dsv3_tools.conversion.executor import RunResult, run
from dsv3_tools.conversion.making import Maker
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.quantize.options import Calibrating, Prepared

__all__ = ["Opened", "carry_out", "opened_with"]

Opened = tuple[Plan, dict[str, Checkpoint], Maker | None]
"""A plan, its sources, and what makes weights if it is calibrated."""


def carry_out(
    opened: AbstractContextManager[Opened],
    destination: PathLike,
    options: RunOptions,
    on_plan: Callable[[Plan], None] | None,
) -> RunResult:
    """Runs what `opened` has planned."""
    with opened as (plan, checkpoints, maker):
        if on_plan is not None:
            on_plan(plan)
        return run(plan, checkpoints, Path(destination), options, maker)


@contextmanager
def opened_with(
    source: SourceLike, calibrating: Calibrating | None
) -> Iterator[tuple[Checkpoint, Prepared | None]]:
    """Opens a source, and reads the calibration data."""
    if calibrating is not None:
        calibrating.check_source(source)
    with Checkpoint(source) as checkpoint:
        yield checkpoint, None if calibrating is None else calibrating.prepare(checkpoint)
