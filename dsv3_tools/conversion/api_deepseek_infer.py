"""To DeepSeek's inference demo as a function, and the plan that it and the command carry out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import SourceLike
from dsv3_tools.conversion.api import Opened, PathLike, carry_out
from dsv3_tools.conversion.deepseek_infer import plan_to_deepseek_infer
from dsv3_tools.conversion.executor import RunResult
from dsv3_tools.conversion.hub_target import PushTarget, as_target
from dsv3_tools.conversion.options import HubOptions, RunOptions
from dsv3_tools.conversion.pinning import pinned
from dsv3_tools.conversion.plan import SOURCE, Plan
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.conversion.ranks import ALONE, Ranks

__all__ = ["convert_to_deepseek_infer", "open_to_deepseek_infer"]


def convert_to_deepseek_infer(
    source: SourceLike,
    destination: PathLike,
    *,
    model_parallel: int,
    device: str = "auto",
    workers: int | None = None,
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
    """Cuts a checkpoint into the shards that DeepSeek's inference demo loads, or goes on where a run stopped.

    Example:
        >>> import dsv3_tools, os, tempfile
        >>> bf16, out = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> _ = dsv3_tools.convert_fp8_to_bf16("miniature/checkpoint", bf16, device="cpu")
        >>> _ = convert_to_deepseek_infer(bf16, out, model_parallel=2, device="cpu")
        >>> sorted(name for name in os.listdir(out) if name.endswith(".safetensors"))
        ['model0-mp2.safetensors', 'model1-mp2.safetensors']

    Args:
        source: directory of the checkpoint: FP8 as released, or BF16.
        destination: directory to write, empty or absent.
        model_parallel: the number of processes that will run the demo; each loads a shard of its own.
        device: "auto", "cpu", "cuda" or "cuda:0,1"; bytes are only copied, so it makes no difference.
        workers: shards worked on at once.
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
    opened = open_to_deepseek_infer(
        pinned(source, destination), model_parallel=model_parallel, partial=partial
    )
    return carry_out(opened, destination, options, on_plan)


@contextmanager
def open_to_deepseek_infer(
    source: SourceLike, *, model_parallel: int, partial: bool = False
) -> Iterator[Opened]:
    """Opens what `convert_to_deepseek_infer` reads, and plans it; see `open_fp8_to_bf16`."""
    with Checkpoint(source) as checkpoint:
        plan = plan_to_deepseek_infer(checkpoint, model_parallel=model_parallel, partial=partial)
        yield plan, {SOURCE: checkpoint}
