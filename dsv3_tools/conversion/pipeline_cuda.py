"""One worker on a GPU: batches of many weights, one launch each, disk and PCIe kept busy meanwhile.

A worker is two threads. This one reads the pieces of a batch into pinned memory and queues copy in,
kernel and copy out on a CUDA stream of its own, without waiting. The other waits for a batch to come
back and hashes and writes it, in file order, while the next one is read. Tensors that are only copied
go into the same pinned buffer and never see the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.checkpoint.writer import ShardWriter
from dsv3_tools.conversion.buffers import as_bytes, view
from dsv3_tools.conversion.findings import Findings
from dsv3_tools.conversion.pieces import Origin, Piece, Read, Write, check_content, cut, read_into
from dsv3_tools.conversion.plan import ShardPlan
from dsv3_tools.conversion.progress import Meter, Stop
from dsv3_tools.formats.recode import recode_into

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BATCH_NBYTES", "CudaPipeline"]

BATCH_NBYTES = (96 << 20, 32 << 20, 12 << 20)
"""Bytes of a batch, input and output together; tried in turn when memory runs out."""

_SLOTS = 2
_ALIGNMENT = 256
_MAX_PIECES = 4096


class CudaPipeline:
    """Pinned and device buffers, a stream and a writing thread, reused for every shard.

    Host memory: 2 slots x `batch_nbytes`; device memory the same.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Origin],
        stop: Stop,
        meter: Meter,
        *,
        device: str,
        batch_nbytes: int,
    ) -> None:
        self._checkpoints = checkpoints
        self._stop = stop
        self._meter = meter
        self._device = device
        self._batch_nbytes = batch_nbytes
        self._slots: list[_Slot] = []
        self._writing = ThreadPoolExecutor(1, "dsv3-write")

    def close(self) -> None:
        """Releases the buffers and ends the writing thread."""
        self._writing.shutdown()
        self._slots.clear()

    def fill(self, shard: ShardPlan, writer: ShardWriter, findings: Findings) -> None:
        """Writes every tensor of `shard`."""
        import torch

        with torch.cuda.device(self._device):
            if not self._slots:
                self._slots = self._make_slots()
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            try:
                with torch.cuda.stream(self._stream):
                    self._fill(shard, writer, findings)
            finally:
                for slot in self._slots:
                    slot.abandon()
                self._stream.synchronize()

    def _make_slots(self) -> list[_Slot]:
        """Takes the memory; pinned memory that is refused counts as memory that has run out."""
        import torch

        try:
            return [_Slot(self._batch_nbytes, self._device) for _ in range(_SLOTS)]
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" not in str(error):
                raise
            raise torch.cuda.OutOfMemoryError(str(error)) from error

    def _fill(self, shard: ShardPlan, writer: ShardWriter, findings: Findings) -> None:
        _, header = shard.header()
        slots = cycle(self._slots)
        slot = next(slots)
        for piece in cut(shard, header, self._batch_nbytes // 8):
            self._stop.check()
            if piece.content is not None and not piece.writes:
                self._compare(piece)
                continue
            if not slot.fits(piece):
                slot.dispatch(self._writing, writer, findings)
                slot = next(slots)
                slot.wait()
            slot.load(piece, self._checkpoints)
            self._meter.add(piece.nbytes_in)
        slot.dispatch(self._writing, writer, findings)
        for slot in self._slots:
            slot.wait()

    def _compare(self, piece: Piece) -> None:
        (read,) = piece.reads.values()
        found = memoryview(bytearray(read.spec.nbytes))
        read_into(self._checkpoints, read, found)
        check_content(piece, found)
        self._meter.add(piece.nbytes_in)


class _Loaded(NamedTuple):
    """A piece and where each of its parts lies in the input and output buffers."""

    piece: Piece
    reads: dict[str, int]
    writes: dict[str, int]


class _Slot:
    """One batch: pinned and device memory, with input from the bottom up and output from the top down.

    Whichever of the two is larger, the memory is used; an offset means the same place in both memories.
    """

    def __init__(self, nbytes: int, device: str) -> None:
        import torch

        self._nbytes = nbytes
        self._host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._counts = torch.empty(_MAX_PIECES, dtype=torch.int32, pin_memory=True)
        self._ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._written: Future[None] | None = None
        self._pair: tuple[object, object] | None = None
        self._reset()

    def fits(self, piece: Piece) -> bool:
        """Whether the piece can join: room in both buffers, and the formats of the batch."""
        same = not piece.is_coded or self._pair in (None, _formats(piece))
        return same and self._has_room(piece) and len(self._loaded) < _MAX_PIECES

    def load(self, piece: Piece, checkpoints: Mapping[str, Origin]) -> None:
        """Reads a piece into the batch; one that is only copied straight into the output.

        Raises:
            OutOfMemoryError: it is larger than an empty batch.
        """
        import torch

        if not self._has_room(piece):
            raise torch.cuda.OutOfMemoryError("a stripe is larger than a batch")
        reads, writes = {}, {}
        self._out_start -= _padded(write.spec for write in piece.writes.values())
        place = self._out_start
        for part, write in piece.writes.items():
            writes[part] = place
            place += _padded([write.spec])
            if piece.content is not None:
                as_bytes(view(self._host, writes[part], write.spec))[:] = piece.content
        for part, read in piece.reads.items():
            if piece.is_coded:
                self._pair = _formats(piece)
                reads[part] = self._in_end
                self._in_end += _padded([read.spec])
            else:
                reads[part] = writes[part]
            read_into(checkpoints, read, as_bytes(view(self._host, reads[part], read.spec)))
        self._loaded.append(_Loaded(piece, reads, writes))

    def dispatch(self, writing: ThreadPoolExecutor, writer: ShardWriter, findings: Findings) -> None:
        """Queues the batch's work on the current stream, and its writing behind it."""
        coded = self._coded()
        if coded:
            source, target = coded[0].piece.step.source, coded[0].piece.step.target
            assert source is not None and target is not None
            self._device[: self._in_end].copy_(self._host[: self._in_end], non_blocking=True)
            items = [self._parts(self._device, loaded.reads, loaded.piece.reads) for loaded in coded]
            outs = [self._parts(self._device, loaded.writes, loaded.piece.writes) for loaded in coded]
            counts = recode_into(source, target, items, outs)
            for start, end in self._coded_spans():
                self._host[start:end].copy_(self._device[start:end], non_blocking=True)
            self._counts[: len(coded)].copy_(counts, non_blocking=True)
        self._ready.record()
        self._written = writing.submit(self._drain, writer, findings)

    def wait(self) -> None:
        """Waits until the batch is written, raises what went wrong, and empties the slot."""
        if self._written is not None:
            self._written.result()
        self._reset()

    def abandon(self) -> None:
        """Makes sure that nobody uses the slot any more, whatever went wrong, and empties it."""
        if self._written is not None and not self._written.cancel():
            self._written.exception()
        self._reset()

    def _drain(self, writer: ShardWriter, findings: Findings) -> None:
        self._ready.synchronize()
        counts = iter(self._counts[: len(self._coded())].tolist())
        for loaded in self._loaded:
            piece = loaded.piece
            items = self._parts(self._host, loaded.reads, piece.reads)
            outs = self._parts(self._host, loaded.writes, piece.writes)
            if piece.content is None:
                findings.note(piece, next(counts) if piece.is_coded else None, items, outs)
            for part, write in piece.writes.items():
                writer.write(write.offset, as_bytes(outs[part]))

    def _has_room(self, piece: Piece) -> bool:
        nbytes = _padded(write.spec for write in piece.writes.values())
        if piece.is_coded:
            nbytes += _padded(read.spec for read in piece.reads.values())
        return self._in_end + nbytes <= self._out_start

    def _reset(self) -> None:
        self._in_end, self._out_start = 0, self._nbytes
        self._loaded: list[_Loaded] = []
        self._pair = None
        self._written = None

    def _coded(self) -> list[_Loaded]:
        return [loaded for loaded in self._loaded if loaded.piece.is_coded]

    def _coded_spans(self) -> Iterator[tuple[int, int]]:
        """Yields the stretches of output that come back from the device, joined where they touch."""
        begin = end = self._nbytes
        for loaded in self._coded():
            first = min(loaded.writes.values())
            last = first + _padded(write.spec for write in loaded.piece.writes.values())
            if last != begin:
                yield begin, end
                end = last
            begin = first
        yield begin, end

    @staticmethod
    def _parts(
        buffer: Tensor, starts: Mapping[str, int], places: Mapping[str, Read] | Mapping[str, Write]
    ) -> dict[str, Tensor]:
        return {part: view(buffer, starts[part], place.spec) for part, place in places.items()}


def _formats(piece: Piece) -> tuple[object, object]:
    return piece.step.source, piece.step.target


def _padded(specs: Iterable[TensorSpec]) -> int:
    """Returns the room that parts take in a buffer, each aligned for 16-byte accesses and more."""
    return sum(-(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT for spec in specs)
