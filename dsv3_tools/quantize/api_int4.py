"""`dsv3 quantize int4` as a function, and the plan that it and the command carry out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dsv3_tools.checkpoint.source import SourceLike
from dsv3_tools.conversion.api import PathLike
from dsv3_tools.conversion.executor import RunResult
from dsv3_tools.conversion.hub_target import PushTarget, as_target
from dsv3_tools.conversion.options import HubOptions, RunOptions
from dsv3_tools.conversion.pinning import pinned
from dsv3_tools.conversion.plan import SOURCE, Plan
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.conversion.quantization import plan_int4
from dsv3_tools.conversion.quantization_options import INT4Options, patterns
from dsv3_tools.conversion.ranks import ALONE, Ranks
from dsv3_tools.errors import UsageError
from dsv3_tools.quantize.opened import Opened, carry_out, opened_with
from dsv3_tools.quantize.options import Calibrating, calibrating_of

__all__ = ["open_quantize_int4", "quantize_int4"]


def quantize_int4(
    source: SourceLike,
    destination: PathLike,
    *,
    layout: str = "compressed-tensors",
    group_size: int = 128,
    symmetric: bool = True,
    scale_search: str = "mse",
    activations: str | None = None,
    rest: str = "bf16",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mtp: str = "quantize",
    method: str = "rtn",
    calibration: PathLike | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    damping: float = 0.01,
    dtype: str | None = None,
    memory: int | None = None,
    save_every: int = 4,
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
    """Quantizes the routed experts of a checkpoint to INT4, or goes on where a run stopped.

    Example:
        >>> import tempfile
        >>> result = quantize_int4("miniature/checkpoint", tempfile.mkdtemp(), device="cpu")
        >>> result.shards_written
        4

    Args:
        source: directory of the checkpoint: FP8, BF16, or quantized otherwise.
        destination: directory to write, empty or absent.
        layout: "compressed-tensors", "gptq" or "awq".
        group_size: neighbours in a row that share a scale: 32, 64 or 128.
        symmetric: no zero points.
        scale_search: "mse" takes the scale with the smallest squared error, "absmax" that of the largest
            weight.
        activations: "fp8" has engines quantize the inputs of INT4 weights (W4A8); None leaves them alone.
        rest: what other linears are stored in: "bf16", or "fp8" in 128 x 128 blocks.
        include: patterns of module names to quantize beside the routed experts.
        exclude: patterns of module names to leave out.
        mtp: "quantize" the MTP module alike, "keep" it unquantized, or "drop" it.
        method: "rtn" rounds to the nearest code; "gptq" and "rtn-weighted" are calibrated: they run the model
            layer by layer, to see which errors matter.
        calibration: a file with text (`.txt`, `.jsonl`) or token ids (`.npy`, `.safetensors`); None is a
            short text that comes along.
        length: tokens of a calibration sequence; None goes by how many there are, up to 2,048.
        max_tokens: of all calibration sequences.
        damping: of "gptq": what is added to a Hessian's diagonal, as a part of its mean.
        dtype: "F32" or "BF16", of the forward pass; None is BF16 on a GPU.
        memory: bytes that hidden states may take in memory before they go to a file.
        save_every: layers after which a calibrated run can go on where it was interrupted.
        device: "auto", "cpu", "cuda" or "cuda:0,1"; the bytes written are the same.
        workers: shards worked on at once.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the source is only a part of the model that its `config.json` describes.
        nonfinite: "error" refuses NaN and infinity, "keep" takes them for zeros and counts them.
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
    calibrating = calibrating_of(
        method,
        nonfinite=nonfinite,
        data=None if calibration is None else Path(calibration),
        length=length,
        max_tokens=max_tokens,
        damping=damping,
        dtype=dtype,
        memory=memory,
        save_every=save_every,
        device=device,
        ranks=ranks,
    )
    opened = open_quantize_int4(
        pinned(source, destination),
        layout=layout,
        group_size=group_size,
        symmetric=symmetric,
        scale_search=scale_search,
        activations=activations,
        rest=rest,
        include=include,
        exclude=exclude,
        mtp=mtp,
        max_shard_size=max_shard_size,
        partial=partial,
        calibrating=calibrating,
    )
    return carry_out(opened, destination, options, on_plan)


@contextmanager
def open_quantize_int4(
    source: SourceLike,
    *,
    layout: str = "compressed-tensors",
    group_size: int = 128,
    symmetric: bool = True,
    scale_search: str = "mse",
    activations: str | None = None,
    rest: str = "bf16",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mtp: str = "quantize",
    max_shard_size: int | None = None,
    partial: bool = False,
    calibrating: Calibrating | None = None,
) -> Iterator[Opened]:
    """Opens what `quantize_int4` reads, and plans it; see `open_fp8_to_bf16`.

    The third thing that it gives is what makes weights, if it is `calibrating`.
    """
    if calibrating is not None and scale_search != INT4Options.scale_search:
        raise UsageError(
            f"--scale-search {scale_search}: --method {calibrating.method} chooses scales by the inputs"
        )
    options = INT4Options(
        include=patterns("include", include),
        exclude=patterns("exclude", exclude),
        mtp=mtp,
        layout=layout,
        group_size=group_size,
        symmetric=symmetric,
        scale_search=scale_search,
        activations=activations,
        rest=rest,
    )
    with opened_with(source, calibrating) as (checkpoint, prepared):
        plan = plan_int4(
            checkpoint,
            options,
            max_shard_size=max_shard_size,
            partial=partial,
            calibration=None if prepared is None else prepared.record(),
        )
        yield plan, {SOURCE: checkpoint}, None if prepared is None else prepared.maker(plan, checkpoint)
