"""The conditions under which a calibrated run computes: the same sums everywhere, finite, within memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dsv3_tools.errors import CheckpointError, UsageError
from dsv3_tools.quantize.states import States

if TYPE_CHECKING:
    import torch

__all__ = ["check_finite", "deterministic", "kind_of_device", "memory_errors", "torch_version"]


def check_finite(states: States, number: int) -> None:
    """Refuses hidden states that say nothing any more.

    Raises:
        CheckpointError: with the layer that made them.
    """
    import torch

    if not all(bool(torch.isfinite(states.block(rows)).all()) for rows in states.own_blocks()):
        raise CheckpointError(
            f"layer {number}: hidden states are NaN or infinite after it, expected finite ones: damaged "
            "weights, or numbers too large for the arithmetic (--dtype)"
        )


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Has torch compute the same sums whatever the machine: one thread on a CPU, no TF32 on a GPU."""
    import torch

    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


@contextmanager
def memory_errors(device: str) -> Iterator[None]:
    """Turns running out of a GPU's memory into advice.

    Raises:
        UsageError: there was not enough.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{device}: out of memory: take fewer tokens (--max-tokens), keep hidden states elsewhere "
            f"(--memory 1GB), or use a larger GPU ({error})"
        ) from error


def kind_of_device(device: str) -> str:
    """Returns what decides, beside torch's version, in which order a device adds up."""
    import torch

    if device == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device)


def torch_version() -> str:
    """Returns torch's version."""
    import torch

    return str(torch.__version__)
