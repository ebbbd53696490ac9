"""Runs a forward pass on one device here, or in a process for each of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import UsageError
from dsv3_tools.model.launch import Report, run_ranks
from dsv3_tools.model.parallel import RankGroup

__all__ = ["COMPUTE_DTYPES", "default_dtype", "run_on"]

COMPUTE_DTYPES = ("F32", "BF16")
"""Types of arithmetic."""

R = TypeVar("R")
F = TypeVar("F")


def default_dtype(devices: Sequence[str]) -> str:
    """Returns BF16 for GPUs, which are made for it, and F32 for a CPU."""
    return "F32" if devices[0] == "cpu" else "BF16"


def run_on(
    devices: Sequence[str],
    work: Callable[[RankGroup, str, Report, R], F],
    request: R,
    on_report: Report,
    stop: Stop,
) -> F:
    """Returns what `work` finds: here, with the processes that torchrun may have started, or in new ones.

    Raises:
        UsageError: the device's memory does not suffice.
        Interrupted: somebody asked `stop`.
    """
    import torch

    def checked(report: object) -> None:
        stop.check()
        on_report(report)

    if len(devices) > 1:
        found: F = run_ranks(_guarded, devices, work, request, on_report=on_report, check=stop.check)
        return found
    return _guarded(RankGroup.join(torch.device(devices[0])), devices[0], checked, work, request)


def _guarded(
    ranks: RankGroup, device: str, report: Report, work: Callable[[RankGroup, str, Report, R], F], request: R
) -> F:
    import torch

    try:
        return work(ranks, device, report, request)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{device}: out of memory: take fewer tokens (--max-tokens), or more devices ({error})"
        ) from error
