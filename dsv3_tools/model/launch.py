"""Starts the ranks of a forward pass on this machine, one process for each device, and waits for them."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

from dsv3_tools.errors import Dsv3Error, UsageError
from dsv3_tools.model.cores import WAIT_POLICY, available_cores
from dsv3_tools.model.parallel import PATIENCE, RankGroup

__all__ = ["Report", "run_ranks"]

Report = Callable[[object], None]

_POLL_SECONDS = 0.2
_SECONDS_TO_END = 10


def run_ranks(
    work: Callable[..., Any],
    devices: Sequence[str],
    *args: Any,
    on_report: Report | None = None,
    check: Callable[[], None] | None = None,
) -> Any:
    """Calls `work(ranks, device, report, *args)` in a process for each device; returns rank 0's result.

    Whatever `work` gives to `report` goes to `on_report` here. When one rank fails, all are ended.

    Args:
        work: a function of a module, called with its `RankGroup`, the device's name and `report`.
        devices: "cuda:0", "cuda:1", ..., or "cpu" several times.
        args: further arguments; they are pickled, as are reports and the result.
        on_report: called with every report of every rank.
        check: called several times a second; may raise to end all ranks.

    Raises:
        Dsv3Error: the first error of a rank, or a rank that ended without a word.
    """
    import torch.multiprocessing

    if not devices:
        raise UsageError("no device for the ranks")
    context = torch.multiprocessing.get_context("spawn")
    ends, processes = [], []
    with tempfile.TemporaryDirectory(prefix="dsv3-ranks-") as folder:
        try:
            for rank in range(len(devices)):
                here, there = context.Pipe(duplex=False)
                arguments = (there, f"{folder}/store", rank, list(devices), work, args)
                process = context.Process(target=_run_rank, args=arguments, daemon=True)
                with _passive_waiting():
                    process.start()
                there.close()
                ends.append(here)
                processes.append(process)
            result = _collect(ends, on_report, check)
            for process in processes:
                process.join(_SECONDS_TO_END)
            return result
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def _passive_waiting() -> Iterator[None]:
    """Has processes that are started meanwhile wait without spinning; see `cores`."""
    if WAIT_POLICY in os.environ:
        yield
        return
    os.environ[WAIT_POLICY] = "passive"
    try:
        yield
    finally:
        del os.environ[WAIT_POLICY]


def _collect(
    ends: Sequence[connection.Connection], on_report: Report | None, check: Callable[[], None] | None
) -> Any:
    """Returns rank 0's result when all ranks have one."""
    results: dict[int, Any] = {}
    open_ends = {end: rank for rank, end in enumerate(ends)}
    while open_ends:
        if check is not None:
            check()
        for end in connection.wait(list(open_ends), _POLL_SECONDS):
            assert isinstance(end, connection.Connection)
            rank = open_ends[end]
            try:
                kind, value = pickle.loads(end.recv_bytes())
            except EOFError:
                raise Dsv3Error(f"rank {rank} ended without a result (killed, or out of memory)") from None
            if kind == "report" and on_report is not None:
                on_report(value)
            elif kind == "error":
                raise _from_rank(rank, *value)
            elif kind == "result":
                results[rank] = value
                del open_ends[end]
    return results[0]


def _run_rank(
    end: connection.Connection,
    store: str,
    rank: int,
    devices: list[str],
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Does the work of one rank in its process, and sends home what comes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    import torch
    from torch import distributed

    is_cuda = devices[rank].startswith("cuda")
    try:
        if is_cuda:
            torch.cuda.set_device(devices[rank])
        else:
            torch.set_num_threads(available_cores(len(devices)))
        os.environ["LOCAL_WORLD_SIZE"] = str(len(devices))
        distributed.init_process_group(
            "nccl" if is_cuda else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=len(devices),
            timeout=PATIENCE,
        )
        ranks = RankGroup(rank, len(devices))
        value = work(ranks, devices[rank], lambda report: _send(end, "report", report), *args)
        _send(end, "result", value if rank == 0 else None)
        distributed.destroy_process_group()
    except Dsv3Error as error:
        _send(end, "error", (error.exit_code, str(error)))
    except BaseException:
        _send(end, "error", (Dsv3Error.exit_code, traceback.format_exc()))


def _send(end: connection.Connection, kind: str, value: object) -> None:
    """Sends a copy home; torch's own pickling leaves tensors with the sender, who may be gone by then."""
    end.send_bytes(pickle.dumps((kind, value)))


def _from_rank(rank: int, exit_code: int, message: str) -> Dsv3Error:
    """Returns a rank's error, with its exit code."""
    error = Dsv3Error(f"rank {rank}: {message}")
    error.exit_code = exit_code
    return error
