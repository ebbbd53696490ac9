"""Bytes of a checkpoint into tensors: on the CPU directly, on a GPU through a little pinned memory.

A unit's tensors lie in one piece of GPU memory, in the order in which the files have them, so that what is
contiguous there is read at once. Every reading thread has two pinned slabs: one fills from the file while
the other is copied to the device. All threads share one copy stream, and none of them waits for the copies:
whoever computes has its stream wait.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dsv3_tools.checkpoint.dtypes import DTYPES, torch_dtype
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["SLAB_NBYTES", "CpuReader", "CudaReader", "Loaded", "Piece", "Reader", "lay_out", "make_reader"]

SLAB_NBYTES = 48 << 20
"""Pinned memory of a slab, of which a thread has two: an expert of DeepSeek-V3 in FP8 (44 MB) takes one copy.

With 16 MiB a layer took 1.35 of the time to read its bytes on an H200, with 48 MiB 1.17: every copy costs
Python's lock, which the computing thread wants, too."""

_ALIGNMENT = 256


class Piece(NamedTuple):
    """A stored tensor, or the stretch of one that begins at byte `start`."""

    checkpoint: Checkpoint
    name: str
    start: int
    spec: TensorSpec


class Loaded(NamedTuple):
    """Tensors in the order of their pieces, to be used after `ready`, and the memory that they lie in.

    On a CPU they can be used at once, and there is no such memory.
    """

    tensors: Sequence[Tensor]
    memory: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def hand_over(self, stream: torch.cuda.Stream) -> None:
        """Has `stream` wait for the copies, and tells the allocator that it uses their memory."""
        if self.memory is not None and self.ready is not None:
            stream.wait_event(self.ready)
            self.memory.record_stream(stream)


class Reader(ABC):
    """Reads tensors to one device; may be used by several threads."""

    @abstractmethod
    def read(self, pieces: Sequence[Piece]) -> Loaded:
        """Returns the tensors of these pieces.

        Raises:
            CheckpointError: one cannot be read.
        """


class CpuReader(Reader):
    """Reads straight into new tensors."""

    def read(self, pieces: Sequence[Piece]) -> Loaded:
        """Returns the tensors, each in memory of its own."""
        import torch

        tensors = []
        for checkpoint, name, start, spec in pieces:
            flat = torch.empty(spec.nbytes, dtype=torch.uint8)
            checkpoint.read_into(name, start, flat.numpy().data)
            tensors.append(_as_tensor(flat, spec))
        return Loaded(tensors)


class _Run(NamedTuple):
    """Contiguous bytes of a file, and their place in a unit's memory; `name` is that of the first tensor."""

    checkpoint: Checkpoint
    name: str
    shard: str
    position: int
    nbytes: int
    place: int


class CudaReader(Reader):
    """Reads into pinned slabs and queues their copies to the device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._local = threading.local()

    def read(self, pieces: Sequence[Piece]) -> Loaded:
        """Returns tensors in one piece of device memory, whose copies have been queued."""
        import torch

        runs, places = lay_out(pieces)
        nbytes = runs[-1].place + runs[-1].nbytes if runs else 0
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            for begin in range(0, nbytes, SLAB_NBYTES):
                self._copy(runs, memory[begin : begin + SLAB_NBYTES], begin)
            ready.record(self._stream)
        flats = (memory[at : at + p.spec.nbytes] for p, at in zip(pieces, places, strict=True))
        tensors = [_as_tensor(flat, piece.spec) for flat, piece in zip(flats, pieces, strict=True)]
        return Loaded(tensors, memory, ready)

    def _copy(self, runs: Sequence[_Run], target: Tensor, begin: int) -> None:
        """Fills a slab with what the unit's memory has from `begin` on, and queues its copy to `target`."""
        slab = self._next_slab()
        slab.copied.synchronize()
        for run, skipped, place, count in _within(runs, begin, begin + len(target)):
            buffer = slab.bytes[place - begin : place - begin + count]
            run.checkpoint.read_file_into(run.shard, run.position + skipped, buffer, what=run.name)
        target.copy_(slab.memory[: len(target)], non_blocking=True)
        slab.copied.record(self._stream)

    def _next_slab(self) -> _Slab:
        if not hasattr(self._local, "slabs"):
            self._local.slabs = [_Slab(), _Slab()]
        self._local.slabs.reverse()
        slab: _Slab = self._local.slabs[0]
        return slab


class _Slab:
    """Pinned memory and the event that says that it has been copied."""

    def __init__(self) -> None:
        import torch

        self.memory = torch.empty(SLAB_NBYTES, dtype=torch.uint8, pin_memory=True)
        self.bytes = self.memory.numpy().data
        self.copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def lay_out(pieces: Sequence[Piece]) -> tuple[list[_Run], list[int]]:
    """Returns the runs that cover some pieces, and where in their common memory each piece begins.

    Runs begin at multiples of 256 bytes. A piece joins the run that ends where it begins, if that leaves it
    at a multiple of its element size.
    """
    runs: list[_Run] = []
    places = [0] * len(pieces)
    located = [
        (id(piece.checkpoint), *piece.checkpoint.location(piece.name), piece.start, number)
        for number, piece in enumerate(pieces)
    ]
    for _, shard, offset, start, number in sorted(located):
        checkpoint, name, _, spec = pieces[number]
        position = offset + start
        last = runs[-1] if runs else None
        end = last.place + last.nbytes if last else 0
        if (
            last
            and checkpoint is last.checkpoint
            and (shard, position) == (last.shard, last.position + last.nbytes)
            and (end * 8) % DTYPES[spec.dtype].bits == 0
        ):
            places[number] = end
            runs[-1] = last._replace(nbytes=last.nbytes + spec.nbytes)
        else:
            places[number] = -(-end // _ALIGNMENT) * _ALIGNMENT
            runs.append(_Run(checkpoint, name, shard, position, spec.nbytes, places[number]))
    return runs, places


def _within(runs: Sequence[_Run], begin: int, end: int) -> Iterator[tuple[_Run, int, int, int]]:
    """Yields the runs with bytes in a window of places: bytes before it, first place in it, bytes in it."""
    for run in runs:
        first, last = max(begin, run.place), min(end, run.place + run.nbytes)
        if first < last:
            yield run, first - run.place, first, last - first


def _as_tensor(flat: Tensor, spec: TensorSpec) -> Tensor:
    return flat.view(torch_dtype(spec.dtype)).view(spec.shape)


def make_reader(device: torch.device) -> Reader:
    """Returns a reader to `device`."""
    return CudaReader(device) if device.type == "cuda" else CpuReader()
