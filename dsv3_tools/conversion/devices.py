"""Which devices a run uses, and how many workers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from math import prod

from dsv3_tools.conversion.plan import ShardPlan, Step
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.errors import UsageError

__all__ = [
    "FEW_WORKERS",
    "count_workers",
    "host_nbytes_per_worker",
    "largest_whole_nbytes",
    "resolve_devices",
]

_MAX_CPU_WORKERS = 16
_WORKERS_PER_GPU = 4

FEW_WORKERS = 4
"""Up to so many CPU workers keep their pieces in the cache; see `pipeline_cpu`."""


def resolve_devices(device: str, ranks: Ranks) -> list[str]:
    """Returns the devices that "auto", "cpu", "cuda", or "cuda:0,1" stand for.

    "auto" is every GPU that is there, or else the CPU. Under torchrun each process takes one of
    the GPUs, by its local rank.

    Raises:
        UsageError: no such device.
    """
    if device == "cpu":
        return ["cpu"]
    numbered = re.fullmatch(r"cuda(?::(\d+(?:,\d+)*))?", device)
    if device != "auto" and numbered is None:
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or cuda:0,1")
    import torch

    count = torch.cuda.device_count()
    if device == "auto" and count == 0:
        return ["cpu"]
    chosen = [int(n) for n in numbered[1].split(",")] if numbered and numbered[1] else list(range(count))
    if not chosen or max(chosen) >= count:
        raise UsageError(f"--device {device}: this machine has {count} usable GPUs; --device cpu needs none")
    if ranks.world_size > 1:
        chosen = [chosen[ranks.local_rank % len(chosen)]]
    return [f"cuda:{number}" for number in chosen]


def count_workers(requested: int | None, devices: Sequence[str], num_shards: int, ranks: Ranks) -> int:
    """Returns how many shards are worked on at once: as requested, or a core each, or a few for each GPU."""
    cores = max(1, len(os.sched_getaffinity(0)) // ranks.processes_here)
    if requested is None and list(devices) == ["cpu"]:
        requested = min(cores, _MAX_CPU_WORKERS)
    elif requested is None:
        # A GPU worker keeps about two cores busy: one reads, one hashes and writes.
        requested = max(len(devices), min(_WORKERS_PER_GPU * len(devices), cores // 2))
    return max(1, min(requested, num_shards))


def host_nbytes_per_worker(devices: Sequence[str], workers: int, shards: Sequence[ShardPlan]) -> int:
    """Returns a bound on the buffers of one worker in host memory.

    On a GPU two batches of pinned input and output, on the CPU a few pieces (larger ones with many
    workers), all independent of the sizes of shards and tensors, but for weights with more than 65,536
    columns, and for layouts that are only coded whole (GPTQ, AWQ).
    """
    if list(devices) != ["cpu"]:
        return (224 << 20) + 2 * largest_whole_nbytes(shards)
    whole = [step for shard in shards for step in shard.steps if _is_whole(step)]
    pieces = 32 << 20 if workers <= FEW_WORKERS else 112 << 20
    # Moving codes about takes up to three bytes for each of them, quantizing them again four more.
    return pieces + max((_coded_nbytes(step) + 7 * prod(step.shape) for step in whole), default=0)


def largest_whole_nbytes(shards: Sequence[ShardPlan]) -> int:
    """Returns the bytes, in and out, of the largest weight that is only coded whole; 0 without one."""
    return max(
        (_coded_nbytes(step) for shard in shards for step in shard.steps if _is_whole(step)), default=0
    )


def _coded_nbytes(step: Step) -> int:
    """Returns the bytes of a step's inputs and outputs."""
    specs = (*step.input_specs(step.shape).values(), *step.output_specs(step.shape).values())
    return sum(spec.nbytes for spec in specs)


def _is_whole(step: Step) -> bool:
    """Whether a step's weight is never divided."""
    formats = [fmt for fmt in (step.source, step.target) if fmt is not None]
    return not step.is_copy and any(fmt.row_alignment is None for fmt in formats)
