"""What is checked before the first byte is written: places, room, and scales."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.pieces import wrong_content
from dsv3_tools.conversion.plan import ShardPlan, Step, TensorRef
from dsv3_tools.conversion.planning import LIKE
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import CheckpointError, DestinationError, UsageError, join_problems
from dsv3_tools.formats import INT4, FP8Block
from dsv3_tools.formats.fp8_block import LIKE_PART
from dsv3_tools.formats.int4_transposed import INT4GPTQ, order_problem
from dsv3_tools.formats.integer import IntegerFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["check_places", "check_room", "check_scales", "content_problems", "filesystem", "free_nbytes"]

LARGEST_PLAUSIBLE_MEDIAN_SCALE = 1.0
"""Largest median of a weight's scales that is believed. Released scales are about 1e-4; stored as
reciprocals they would be thousands. A weight with a median of 1 would hold values of hundreds."""

MAX_INTEGER_SAMPLE = 512
"""Integer weights whose scales are read beforehand: up to a second for DeepSeek-V3's shapes."""


def check_places(checkpoints: Mapping[str, Checkpoint], destination: Path) -> None:
    """Refuses a destination that is, contains, or lies in a source, by whatever path or link.

    Raises:
        UsageError: naming both places.
    """
    target = destination.resolve()
    local = {c.source: c for c in checkpoints.values() if isinstance(c.source, Path)}
    for directory in local:
        source = directory.resolve()
        same = target == source or (target.exists() and os.path.samefile(target, source))
        if same or target.is_relative_to(source) or source.is_relative_to(target):
            raise UsageError(
                f"{destination}: the destination and {directory} are the same directory or one "
                "lies in the other; choose a directory beside it"
            )
    if not target.is_dir():
        return
    sources = {
        _identity(checkpoint.path(shard)) for checkpoint in local.values() for shard in checkpoint.shards
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
    return shutil.disk_usage(_existing(destination)).free


def filesystem(destination: Path) -> int:
    """Returns the number of the filesystem where `destination` is or will be."""
    return _existing(destination).stat().st_dev


def _existing(place: Path) -> Path:
    existing = place.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def check_scales(
    shards: Sequence[ShardPlan],
    checkpoints: Mapping[str, Checkpoint],
    *,
    nonfinite: str,
    stop: Stop,
) -> None:
    """Reads what decides how codes are read, and refuses what cannot be right.

    A scale must be finite and positive (with `nonfinite` "keep" this is let pass) and of a plausible
    magnitude: reciprocals under the same name would give weights that are wrong by a factor of millions. A
    part whose content follows from the weight's shape must have that content.

    Of integer weights, whose scales are gigabytes, a sample is looked at: enough to find what is wrong
    with all of them. The rest is noticed when it is read.

    Raises:
        CheckpointError: every tensor that is refused, in one message.
        Interrupted: somebody has asked `stop`.
    """
    coded = [step for shard in shards for step in shard.steps if not step.is_copy]
    integers = [step for step in coded if isinstance(step.source, IntegerFormat)]
    steps = [step for step in coded if not isinstance(step.source, IntegerFormat)]
    steps += integers[:: -(-len(integers) // MAX_INTEGER_SAMPLE) or 1]
    # By tensor: several ranks may have a part of it.
    copied = {step.weight: step for shard in shards for step in shard.steps if step.copies_scales}
    keep = nonfinite == "keep"

    def judge(step: Step) -> list[str]:
        stop.check()
        return content_problems(step, checkpoints, keep=keep)

    with ThreadPoolExecutor(8) as pool:
        problems = [problem for found in pool.map(judge, [*steps, *copied.values()]) for problem in found]
    if problems:
        raise CheckpointError(f"{checkpoints['source'].source}: {join_problems(problems)}")


def content_problems(step: Step, checkpoints: Mapping[str, Checkpoint], *, keep: bool = False) -> list[str]:
    """Returns what is wrong with the scales and the fixed parts of one weight; `keep` allows any number."""
    return [*_scale_problems(step, checkpoints, keep), *_fixed_problems(step, checkpoints)]


def _fixed_problems(step: Step, checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    for part, expected in step.fixed_inputs.items():
        ref = step.inputs[part]
        if checkpoints[ref.origin].read_bytes(ref.name) != expected:
            yield wrong_content(step, ref)
    if isinstance(step.source, INT4GPTQ) and step.source.act_order:
        ref = step.inputs["g_idx"]
        order = np.frombuffer(checkpoints[ref.origin].read_bytes(ref.name), dtype="<i4")
        problem = order_problem(int(order.min()), int(order.max()), step.source.groups(step.shape))
        if problem is not None:
            yield f"{ref.name}: {problem}"


def _scale_problems(step: Step, checkpoints: Mapping[str, Checkpoint], keep: bool) -> Iterator[str]:
    own = step.source.scale_part if step.source is not None else "weight" if step.copies_scales else None
    for part in (own, LIKE_PART):
        if part is not None and part in step.inputs:
            problem = _scale_problem(step, step.inputs[part], checkpoints, keep)
            if problem is not None:
                yield problem


def _scale_problem(
    step: Step, ref: TensorRef, checkpoints: Mapping[str, Checkpoint], keep: bool
) -> str | None:
    checkpoint = checkpoints[ref.origin]
    spec = checkpoint.specs[ref.name]
    scale = _as_float32(checkpoint.read_bytes(ref.name), spec.dtype)
    # Some tools write INT4 with signed scales, for the one code more on the negative side.
    signed = isinstance(step.source, INT4)
    bad = ~(np.isfinite(scale) & ((scale != 0) if signed else (scale > 0)))
    if bad.any() and not keep:
        first = int(np.argmax(bad))
        index = np.unravel_index(first, spec.shape)
        return (
            f"{ref.name}: the scale at [{', '.join(str(int(i)) for i in index)}] is {scale[first]}, expected "
            f"a finite number {'other than 0' if signed else 'above 0'} (a damaged checkpoint?); "
            "--nonfinite keep goes on"
        )
    good = np.abs(scale[~bad])
    inverse = isinstance(step.source, FP8Block) and step.source.inverse_scales
    with np.errstate(over="ignore"):
        median = float(np.median(1 / good if inverse else good)) if good.size else 0.0
    if median > LARGEST_PLAUSIBLE_MEDIAN_SCALE:
        question = "are its scales multipliers" if inverse else "are its scales reciprocals"
        readable = ref.origin != LIKE and isinstance(step.source, FP8Block)
        remedy = " --scale-semantics of convert fp8-to-bf16 says how to read them" if readable else ""
        return (
            f"{ref.name}: weights would be multiplied by {median:.3g}, expected less than "
            f"{LARGEST_PLAUSIBLE_MEDIAN_SCALE:g}; {question}?{remedy}"
        )
    return None


def _as_float32(data: bytearray, dtype: str) -> NDArray[np.float32]:
    """Returns the numbers in the bytes of a tensor of scales: F32, F16 or BF16."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, dtype="<f2" if dtype == "F16" else "<f4").astype("<f4", copy=False)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
