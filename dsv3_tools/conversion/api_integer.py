"""From INT8 and INT4 to BF16 as functions, and the plans that they and the commands carry out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import SourceLike
from dsv3_tools.conversion.api import Opened, PathLike, carry_out
from dsv3_tools.conversion.executor import RunResult
from dsv3_tools.conversion.hub_target import PushTarget, as_target
from dsv3_tools.conversion.options import HubOptions, RunOptions
from dsv3_tools.conversion.pinning import pinned
from dsv3_tools.conversion.plan import SOURCE, Plan
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.conversion.ranks import ALONE, Ranks
from dsv3_tools.conversion.recode import plan_int4_to_bf16, plan_int8_to_bf16

__all__ = ["convert_int4_to_bf16", "convert_int8_to_bf16", "open_int4_to_bf16", "open_int8_to_bf16"]


def convert_int8_to_bf16(
    source: SourceLike,
    destination: PathLike,
    *,
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
    """Rewrites an INT8 checkpoint as BF16, or goes on where an interrupted run stopped.

    Example:
        >>> import dsv3_tools, tempfile
        >>> quantized, bf16 = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> _ = dsv3_tools.quantize_int8("miniature/checkpoint", quantized, device="cpu")
        >>> result = convert_int8_to_bf16(quantized, bf16, device="cpu")
        >>> result.nbytes_out
        25092448

    Args:
        source: directory of the checkpoint: blocks or channels.
        destination: directory to write, empty or absent.
        device: "auto", "cpu", "cuda" or "cuda:0,1"; the bytes written are the same.
        workers: shards worked on at once.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the source is only a part of the model that its `config.json` describes.
        nonfinite: "error" refuses NaN and infinity, "keep" keeps them and counts them in the manifest.
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
    opened = open_int8_to_bf16(pinned(source, destination), max_shard_size=max_shard_size, partial=partial)
    return carry_out(opened, destination, options, on_plan)


def convert_int4_to_bf16(
    source: SourceLike,
    destination: PathLike,
    *,
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
    """Rewrites an INT4 checkpoint as BF16, or goes on where an interrupted run stopped.

    Example:
        >>> import dsv3_tools, tempfile
        >>> quantized, bf16 = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> _ = dsv3_tools.quantize_int4("miniature/checkpoint", quantized, device="cpu")
        >>> result = convert_int4_to_bf16(quantized, bf16, device="cpu")
        >>> result.nbytes_out
        25092448

    Args:
        source: directory of the checkpoint: compressed-tensors, GPTQ or AWQ.
        destination: directory to write, empty or absent.
        device: "auto", "cpu", "cuda" or "cuda:0,1"; the bytes written are the same.
        workers: shards worked on at once.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the source is only a part of the model that its `config.json` describes.
        nonfinite: "error" refuses NaN and infinity, "keep" keeps them and counts them in the manifest.
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
    opened = open_int4_to_bf16(pinned(source, destination), max_shard_size=max_shard_size, partial=partial)
    return carry_out(opened, destination, options, on_plan)


@contextmanager
def open_int8_to_bf16(
    source: SourceLike, *, max_shard_size: int | None = None, partial: bool = False
) -> Iterator[Opened]:
    """Opens what `convert_int8_to_bf16` reads, and plans it; see `open_fp8_to_bf16`."""
    with Checkpoint(source) as checkpoint:
        yield (
            plan_int8_to_bf16(checkpoint, max_shard_size=max_shard_size, partial=partial),
            {SOURCE: checkpoint},
        )


@contextmanager
def open_int4_to_bf16(
    source: SourceLike, *, max_shard_size: int | None = None, partial: bool = False
) -> Iterator[Opened]:
    """Opens what `convert_int4_to_bf16` reads, and plans it; see `open_fp8_to_bf16`."""
    with Checkpoint(source) as checkpoint:
        yield (
            plan_int4_to_bf16(checkpoint, max_shard_size=max_shard_size, partial=partial),
            {SOURCE: checkpoint},
        )
