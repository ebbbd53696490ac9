"""The conversions as functions, and the plans that they and the commands of the same names carry out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import SourceLike
from dsv3_tools.conversion.executor import RunResult, run
from dsv3_tools.conversion.hub_target import PushTarget, as_target
from dsv3_tools.conversion.options import HubOptions, RunOptions
from dsv3_tools.conversion.pinning import pinned
from dsv3_tools.conversion.plan import SOURCE, Plan
from dsv3_tools.conversion.planning import LIKE
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.conversion.ranks import ALONE, Ranks
from dsv3_tools.conversion.recode import plan_bf16_to_fp8, plan_fp8_to_bf16

__all__ = [
    "carry_out",
    "convert_bf16_to_fp8",
    "convert_fp8_to_bf16",
    "open_bf16_to_fp8",
    "open_fp8_to_bf16",
]

PathLike = str | os.PathLike[str]
Opened = tuple[Plan, dict[str, Checkpoint]]


def convert_fp8_to_bf16(
    source: SourceLike,
    destination: PathLike,
    *,
    device: str = "auto",
    workers: int | None = None,
    max_shard_size: int | None = None,
    scale_semantics: str | None = None,
    partial: bool = False,
    nonfinite: str = "error",
    overwrite: bool = False,
    keep_source: bool = False,
    push: str | PushTarget | None = None,
    keep_output: bool = True,
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Rewrites an FP8 checkpoint as BF16, or goes on where an interrupted run stopped.

    Example:
        >>> import tempfile
        >>> result = convert_fp8_to_bf16("miniature/checkpoint", tempfile.mkdtemp(), device="cpu")
        >>> result.shards_written, result.nbytes_out
        (4, 25092448)

    Args:
        source: directory of the FP8 checkpoint.
        destination: directory to write, empty or absent.
        device: "auto", "cpu", "cuda" or "cuda:0,1"; the bytes written are the same.
        workers: shards worked on at once.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        scale_semantics: "multiply" or "inverse", against what `config.json` says.
        partial: the source is only a part of the model that its `config.json` describes.
        nonfinite: "error" refuses NaN and infinity, "keep" counts them in the manifest.
        overwrite: replace whatever checkpoint is at `destination`.
        keep_source: shards fetched from the Hub stay in the Hugging Face cache.
        push: `org/name` or `org/name@branch` on the Hub, where shards are uploaded to as they are finished.
        keep_output: leave them here as well.
        on_plan: called with the plan before anything is written.
        on_progress: called with every step, from any thread.
        stop: lets a signal handler end the run cleanly.
        ranks: `Ranks.join()` shares the run with the other processes that torchrun started; every one of
            them must make the same call.

    Raises:
        Dsv3Error: see `dsv3_tools.errors`; nothing half-written is left under a final name.
    """
    hub = HubOptions(keep_source, as_target(push), keep_output)
    options = RunOptions(device, workers, overwrite, nonfinite, on_progress, stop, ranks, hub)
    opened = open_fp8_to_bf16(
        pinned(source, destination),
        max_shard_size=max_shard_size,
        scale_semantics=scale_semantics,
        partial=partial,
    )
    return carry_out(opened, destination, options, on_plan)


def convert_bf16_to_fp8(
    source: SourceLike,
    destination: PathLike,
    *,
    scale_fmt: str | None = None,
    like: SourceLike | None = None,
    device: str = "auto",
    workers: int | None = None,
    max_shard_size: int | None = None,
    partial: bool = False,
    nonfinite: str = "error",
    overwrite: bool = False,
    keep_source: bool = False,
    push: str | PushTarget | None = None,
    keep_output: bool = True,
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Rewrites a BF16 checkpoint in DeepSeek's FP8 layout, or goes on where a run stopped.

    Example:
        >>> import tempfile
        >>> bf16, fp8 = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> _ = convert_fp8_to_bf16("miniature/checkpoint", bf16, device="cpu")
        >>> result = convert_bf16_to_fp8(bf16, fp8, like="miniature/checkpoint", device="cpu")
        >>> result.blocks_kept, result.blocks_compared
        (636, 636)

    Args:
        source: directory of the unquantized checkpoint.
        destination: directory to write, empty or absent.
        scale_fmt: "f32" (V3, R1) or "ue8m0" (V3.1); None is "f32", or that of `like`.
        like: directory of the FP8 checkpoint that `source` was dequantized from. Blocks of weights
            that did not change get their old bytes back.
        device: "auto", "cpu", "cuda" or "cuda:0,1"; the bytes written are the same.
        workers: shards worked on at once.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the source is only a part of the model that its `config.json` describes.
        nonfinite: "error" refuses NaN and infinity, "keep" writes NaN codes and counts them.
        overwrite: replace whatever checkpoint is at `destination`.
        keep_source: shards fetched from the Hub stay in the Hugging Face cache.
        push: `org/name` or `org/name@branch` on the Hub, where shards are uploaded to as they are finished.
        keep_output: leave them here as well.
        on_plan: called with the plan before anything is written.
        on_progress: called with every step, from any thread.
        stop: lets a signal handler end the run cleanly.
        ranks: `Ranks.join()` shares the run with the other processes that torchrun started; every one of
            them must make the same call.

    Raises:
        Dsv3Error: see `dsv3_tools.errors`; nothing half-written is left under a final name.
    """
    hub = HubOptions(keep_source, as_target(push), keep_output)
    options = RunOptions(device, workers, overwrite, nonfinite, on_progress, stop, ranks, hub)
    opened = open_bf16_to_fp8(
        pinned(source, destination),
        scale_fmt=scale_fmt,
        like=None if like is None else pinned(like, destination, origin=LIKE),
        max_shard_size=max_shard_size,
        partial=partial,
    )
    return carry_out(opened, destination, options, on_plan)


def carry_out(
    opened: AbstractContextManager[Opened],
    destination: PathLike,
    options: RunOptions,
    on_plan: Callable[[Plan], None] | None,
) -> RunResult:
    """Runs what `opened` has planned."""
    with opened as (plan, checkpoints):
        if on_plan is not None:
            on_plan(plan)
        return run(plan, checkpoints, Path(destination), options)


@contextmanager
def open_fp8_to_bf16(
    source: SourceLike,
    *,
    max_shard_size: int | None = None,
    scale_semantics: str | None = None,
    partial: bool = False,
) -> Iterator[Opened]:
    """Opens what `convert_fp8_to_bf16` reads and plans it, for a look before a run or without one.

    Example:
        >>> with open_fp8_to_bf16("miniature/checkpoint") as (plan, _):
        ...     print(plan.payload_nbytes)
        25054528
    """
    with Checkpoint(source) as checkpoint:
        plan = plan_fp8_to_bf16(
            checkpoint, max_shard_size=max_shard_size, scale_semantics=scale_semantics, partial=partial
        )
        yield plan, {SOURCE: checkpoint}


@contextmanager
def open_bf16_to_fp8(
    source: SourceLike,
    *,
    scale_fmt: str | None = None,
    like: SourceLike | None = None,
    max_shard_size: int | None = None,
    partial: bool = False,
) -> Iterator[Opened]:
    """Opens what `convert_bf16_to_fp8` reads, and plans it; see `open_fp8_to_bf16`."""
    with ExitStack() as opened:
        checkpoint = opened.enter_context(Checkpoint(source))
        original = None if like is None else opened.enter_context(Checkpoint(like))
        plan = plan_bf16_to_fp8(
            checkpoint,
            scale_fmt=scale_fmt,
            like=original,
            max_shard_size=max_shard_size,
            partial=partial,
        )
        yield plan, {SOURCE: checkpoint} | ({LIKE: original} if original is not None else {})
