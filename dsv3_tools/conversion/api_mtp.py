"""Splitting off an MTP module and merging it again, and the plans that functions and commands carry out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import SourceLike
from dsv3_tools.conversion.api import Opened, PathLike, carry_out
from dsv3_tools.conversion.executor import RunResult, run
from dsv3_tools.conversion.hub_target import PushTarget, as_target
from dsv3_tools.conversion.mtp import plan_split_main, plan_split_mtp, read_halves
from dsv3_tools.conversion.mtp_merge import MTP, plan_merge
from dsv3_tools.conversion.options import HubOptions, RunOptions
from dsv3_tools.conversion.pinning import pinned
from dsv3_tools.conversion.plan import SOURCE, Plan
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.conversion.ranks import ALONE, Ranks
from dsv3_tools.conversion.together import Part, check_together
from dsv3_tools.errors import UsageError

__all__ = ["SplitResult", "merge_mtp", "open_merge_mtp", "open_split_mtp", "split_mtp"]


@dataclass(frozen=True)
class SplitResult:
    """What a split did: a run for each of the two results that were asked for."""

    main: RunResult | None
    mtp: RunResult | None


def split_mtp(
    source: SourceLike,
    *,
    main: PathLike | None = None,
    mtp: PathLike | None = None,
    layout: str = "native",
    drop_shared: bool = False,
    allow_different_shared: bool = False,
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
) -> SplitResult:
    """Copies a checkpoint without its MTP module, that module alone, or both, or goes on where a run stopped.

    Example:
        >>> import tempfile
        >>> result = split_mtp("miniature/checkpoint", main=tempfile.mkdtemp(), mtp=tempfile.mkdtemp())
        >>> result.main.nbytes_out, result.mtp.nbytes_out
        (10544940, 4310404)

    Args:
        source: directory of the checkpoint, in any format.
        main: directory to write the model without the module to, empty or absent.
        mtp: directory to write the module to, empty or absent.
        layout: of the module: "native" keeps names and config (vLLM, LMDeploy), "sglang-nextn" makes it layer
            0 of a model of its own (SGLang, LightLLM).
        drop_shared: leave `embed_tokens` and `shared_head.head`, which the main model has as well, out of the
            module; "sglang-nextn" always does. Merging puts them back.
        allow_different_shared: go on though these are not the main model's, bit for bit.
        device: "auto", "cpu", "cuda" or "cuda:0,1"; bytes are only copied, so it makes no difference.
        workers: shards worked on at once.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the source is only a part of the model that its `config.json` describes.
        nonfinite: "error" refuses NaN and infinity, "keep" keeps them and counts them in the manifest.
        overwrite: replace whatever checkpoints are at `main` and `mtp`.
        keep_source: shards fetched from the Hub stay in the Hugging Face cache.
        push: `org/name` or `org/name@branch` on the Hub, where shards are uploaded to as they are finished.
        keep_output: leave them here as well.
        on_plan: called with each plan before anything is written.
        on_progress: called with every step, from any thread.
        stop: lets a signal handler end the run cleanly.
        ranks: `Ranks.join()` shares the run with the other processes that torchrun started; every one of
            them must make the same call.

    Raises:
        Dsv3Error: see `dsv3_tools.errors`; nothing half-written is left under a final name.
    """
    hub = HubOptions(keep_source, as_target(push), keep_output)
    options = RunOptions(device, workers, overwrite, nonfinite, on_progress, stop, ranks, hub)
    opened = open_split_mtp(
        pinned(source, main, mtp),
        main=main,
        mtp=mtp,
        layout=layout,
        drop_shared=drop_shared,
        allow_different_shared=allow_different_shared,
        max_shard_size=max_shard_size,
        partial=partial,
    )
    with opened as (parts, checkpoints):
        if on_plan is not None:
            for part in parts.values():
                on_plan(part.plan)
        check_together(list(parts.values()), checkpoints, options)
        made = {half: run(part.plan, checkpoints, part.destination, options) for half, part in parts.items()}
        return SplitResult(made.get("main"), made.get("mtp"))


def merge_mtp(
    main: SourceLike,
    mtp: SourceLike,
    destination: PathLike,
    *,
    allow_different_shared: bool = False,
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
    """Puts an MTP module beside a model, or goes on where a run stopped.

    Example:
        >>> import tempfile
        >>> main, mtp, whole = tempfile.mkdtemp(), tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> _ = split_mtp("miniature/checkpoint", main=main, mtp=mtp, layout="sglang-nextn")
        >>> merge_mtp(main, mtp, whole).nbytes_out
        14855384

    Args:
        main: directory of the model, in any format, without an MTP module.
        mtp: directory of the module, in either layout of `split_mtp`, or of a checkpoint that has one.
        destination: directory to write, empty or absent.
        allow_different_shared: go on though the module's `embed_tokens` or `shared_head.head` is not what the
            model has, bit for bit: it is another release's, or one of the two was trained since.
        device: "auto", "cpu", "cuda" or "cuda:0,1"; bytes are only copied, so it makes no difference.
        workers: shards worked on at once.
        max_shard_size: bytes of tensors in an output shard; None keeps the shards of both, or gives back
            those of the checkpoint that the two were split from.
        partial: the two are only parts of what their `config.json` describe.
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
    opened = open_merge_mtp(
        pinned(main, destination),
        pinned(mtp, destination, origin=MTP),
        allow_different_shared=allow_different_shared,
        max_shard_size=max_shard_size,
        partial=partial,
    )
    return carry_out(opened, destination, options, on_plan)


@contextmanager
def open_merge_mtp(
    main: SourceLike,
    mtp: SourceLike,
    *,
    allow_different_shared: bool = False,
    max_shard_size: int | None = None,
    partial: bool = False,
) -> Iterator[Opened]:
    """Opens what `merge_mtp` reads, and plans it; see `open_fp8_to_bf16`."""
    with Checkpoint(main) as model, Checkpoint(mtp) as module:
        plan = plan_merge(
            model,
            module,
            allow_different_shared=allow_different_shared,
            max_shard_size=max_shard_size,
            partial=partial,
        )
        yield plan, {SOURCE: model, MTP: module}


@contextmanager
def open_split_mtp(
    source: SourceLike,
    *,
    main: PathLike | None = None,
    mtp: PathLike | None = None,
    layout: str = "native",
    drop_shared: bool = False,
    allow_different_shared: bool = False,
    max_shard_size: int | None = None,
    partial: bool = False,
) -> Iterator[tuple[Mapping[str, Part], dict[str, Checkpoint]]]:
    """Opens what `split_mtp` reads, and plans what goes to `main` and to `mtp`; see `open_fp8_to_bf16`."""
    if main is None and mtp is None:
        raise UsageError("neither --main nor --mtp: say where the model, its MTP module, or both are to go")
    with Checkpoint(source) as checkpoint:
        halves = read_halves(checkpoint)
        parts: dict[str, Part] = {}
        if main is not None:
            plan = plan_split_main(checkpoint, halves, max_shard_size=max_shard_size, partial=partial)
            parts["main"] = Part(plan, Path(main))
        if mtp is not None:
            plan = plan_split_mtp(
                checkpoint,
                halves,
                layout=layout,
                drop_shared=drop_shared,
                allow_different_shared=allow_different_shared,
                max_shard_size=max_shard_size,
                partial=partial,
            )
            parts["mtp"] = Part(plan, Path(mtp))
        yield parts, {SOURCE: checkpoint}
