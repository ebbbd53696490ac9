"""What is checked before the first byte is written: places, room, and scales."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.plan import ShardPlan, Step, TensorRef
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import CheckpointError, DestinationError, UsageError, join_problems
from dsv3_tools.formats import FP8Block
from dsv3_tools.formats.fp8_block import LIKE_PART, SCALE_PART

__all__ = ["check_places", "check_room", "check_scales", "free_nbytes"]

LARGEST_PLAUSIBLE_MEDIAN_SCALE = 1.0
"""Largest median of a weight's scales that is believed. Released scales are about 1e-4; stored as
reciprocals they would be thousands. A weight with a median of 1 would hold values of hundreds."""


def check_places(checkpoints: Mapping[str, Checkpoint], destination: Path) -> None:
    """Refuses a destination that is, contains, or lies in a source, by whatever path or link.

    Raises:
        UsageError: naming both places.
    """
    target = destination.resolve()
    for checkpoint in checkpoints.values():
        source = checkpoint.directory.resolve()
        same = target == source or (target.exists() and os.path.samefile(target, source))
        if same or target.is_relative_to(source) or source.is_relative_to(target):
            raise UsageError(
                f"{destination}: the destination and {checkpoint.directory} are the same directory or one "
                "lies in the other; choose a directory beside it"
            )
    if not target.is_dir():
        return
    sources = {
        _identity(shard.path) for checkpoint in checkpoints.values() for shard in checkpoint.shards.values()
    }
    for path in target.glob("*.safetensors"):
        if path.exists() and _identity(path) in sources:
            raise UsageError(f"{path}: is the same file as one of the source; choose another directory")


def check_room(destination: Path, nbytes: int) -> None:
    """Refuses when the destination's filesystem has fewer than `nbytes` free.

    Raises:
        DestinationError: with both figures.
    """
    free = free_nbytes(destination)
    if free < nbytes:
        raise DestinationError(
            f"{destination}: {free:,} bytes are free, the run needs {nbytes:,}, {nbytes - free:,} more; "
            "free some space or choose another disk"
        )


def free_nbytes(destination: Path) -> int:
    """Returns the bytes free for this user where `destination` is or will be."""
    existing = destination.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_scales(
    shards: Sequence[ShardPlan],
    checkpoints: Mapping[str, Checkpoint],
    *,
    nonfinite: str,
    stop: Stop,
) -> None:
    """Reads every scale that `shards` need and refuses those that cannot be right.

    A scale must be finite and positive (with `nonfinite` "keep" this is let pass) and of a plausible
    magnitude: reciprocals under the same name would give weights that are wrong by a factor of millions.

    Raises:
        CheckpointError: every tensor that is refused, in one message.
        Interrupted: somebody has asked `stop`.
    """
    steps = [step for shard in shards for step in shard.steps if not step.is_copy]
    tasks = [
        (step, ref) for step in steps for part, ref in step.inputs.items() if part in (SCALE_PART, LIKE_PART)
    ]
    keep = nonfinite == "keep"

    def judge(task: tuple[Step, TensorRef]) -> str | None:
        stop.check()
        return _scale_problem(*task, checkpoints, keep)

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(judge, tasks)
        problems = [problem for problem in found if problem is not None]
    if problems:
        raise CheckpointError(f"{checkpoints['source'].directory}: {join_problems(problems)}")


def _scale_problem(
    step: Step, ref: TensorRef, checkpoints: Mapping[str, Checkpoint], keep: bool
) -> str | None:
    checkpoint = checkpoints[ref.origin]
    scale = np.frombuffer(checkpoint.read_bytes(ref.name), dtype="<f4")
    bad = ~(np.isfinite(scale) & (scale > 0))
    if bad.any() and not keep:
        first = int(np.argmax(bad))
        index = np.unravel_index(first, checkpoint.specs[ref.name].shape)
        return (
            f"{ref.name}: the scale at [{', '.join(str(int(i)) for i in index)}] is {scale[first]}, expected "
            "a finite, positive number"
        )
    good = scale[~bad]
    inverse = isinstance(step.source, FP8Block) and step.source.inverse_scales
    with np.errstate(over="ignore"):
        median = float(np.median(1 / good if inverse else good)) if good.size else 0.0
    if median > LARGEST_PLAUSIBLE_MEDIAN_SCALE:
        question = "are its scales multipliers" if inverse else "are its scales reciprocals"
        remedy = "" if ref.origin == "like" else " --scale-semantics says how to read them"
        return (
            f"{ref.name}: weights would be multiplied by {median:.3g}, expected less than "
            f"{LARGEST_PLAUSIBLE_MEDIAN_SCALE:g}; {question}?{remedy}"
        )
    return None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
