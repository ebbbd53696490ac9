"""Cuts the steps of a shard into pieces small enough to be in memory.

Large weights go in stripes of whole rows, aligned to the rows that share a scale; copies in chunks of
bytes. Where the parts of a format are stored row by row, the bytes of a stripe of a part follow those of the
rows before it; a weight in any other format is one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Protocol

from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.checkpoint.header import Header
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.plan import ShardPlan, Share, Step, TensorRef
from dsv3_tools.errors import CheckpointError
from dsv3_tools.formats import Format

__all__ = ["Origin", "Piece", "Read", "Write", "check_content", "cut", "read_into", "wrong_content"]


class Origin(Protocol):
    """What pieces are read from: a checkpoint, or what a run has made in memory."""

    @property
    def weight_map(self) -> Mapping[str, str]:
        """The shard of every tensor."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with a tensor's bytes from byte `start` on."""

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        """Has these bytes of a tensor read ahead."""

    def check_unchanged(self, shard: str) -> None:
        """Refuses a shard that was written to since it was opened."""


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of a source tensor: from `start`, as many as `spec` has.

    With `row_nbytes` they are not neighbours: of each row of `spec`, what lies at `start` + row x
    `row_nbytes`.
    """

    ref: TensorRef
    start: int
    spec: TensorSpec
    row_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes of the output file: at `offset`, as many as `spec` has."""

    offset: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """A stripe of one step: what to read and write of each part, and its first element's index.

    `content` is what is written where nothing is read, and what must be found where nothing is written.
    """

    step: Step
    reads: Mapping[str, Read]
    writes: Mapping[str, Write]
    first_element: int
    content: bytes | None = None

    @property
    def is_coded(self) -> bool:
        """Whether the piece is decoded and encoded, not copied."""
        return self.content is None and not self.step.is_copy

    @property
    def nbytes_in(self) -> int:
        """Bytes read."""
        return sum(read.spec.nbytes for read in self.reads.values())

    @property
    def nbytes_out(self) -> int:
        """Bytes written."""
        return sum(write.spec.nbytes for write in self.writes.values())


def cut(shard: ShardPlan, header: Header, max_nbytes: int) -> Iterator[Piece]:
    """Yields the pieces of a shard, each with about `max_nbytes` to read or write, nearly in file order.

    What is known beforehand comes first. A stripe has at least the rows that its formats keep together, so
    a very wide weight may exceed `max_nbytes`: 128 rows of 18,432 columns in BF16 are 4.7 MB.
    """
    for step in shard.steps:
        yield from _fixed_pieces(step, header)
    for step in shard.steps:
        if not step.is_copy:
            yield from _expected_pieces(step)
            yield from _stripes(step, header, max_nbytes)
        elif step.share is None or step.share.axis is None:
            yield from _copy_pieces(step, header, max_nbytes)
        else:
            yield from _share_pieces(step, step.share, header, max_nbytes)


def read_into(checkpoints: Mapping[str, Origin], read: Read, buffer: memoryview) -> None:
    """Fills `buffer` with the bytes of `read`.

    Raises:
        CheckpointError: the file ended early or could not be read.
    """
    checkpoint, name = checkpoints[read.ref.origin], read.ref.name
    if read.row_nbytes is None:
        checkpoint.read_into(name, read.start, buffer)
        return
    rows = read.spec.shape[0]
    width = len(buffer) // rows
    whole = memoryview(bytearray((rows - 1) * read.row_nbytes + width))
    checkpoint.read_into(name, read.start, whole)
    for row in range(rows):
        begin = row * read.row_nbytes
        buffer[row * width : (row + 1) * width] = whole[begin : begin + width]


def check_content(piece: Piece, found: memoryview) -> None:
    """Refuses a part that does not hold what the shape of its weight demands.

    Raises:
        CheckpointError: with its name.
    """
    if piece.content is not None and found != piece.content:
        (read,) = piece.reads.values()
        raise CheckpointError(wrong_content(piece.step, read.ref))


def wrong_content(step: Step, ref: TensorRef) -> str:
    """Returns what to say of a part that does not hold what the shape of its weight demands."""
    name = "" if step.source is None else f"{step.source.name} "
    return (
        f"{ref.name}: does not hold what belongs to {name}weights of shape {list(step.shape)} "
        "(by config.json and by the codes' shape)"
    )


def _fixed_pieces(step: Step, header: Header) -> Iterator[Piece]:
    specs = step.output_specs(step.shape)
    for part, content in step.fixed_outputs.items():
        place = Write(header.offsets[step.outputs[part]], specs[part])
        yield Piece(step, {}, {part: place}, 0, content)


def _expected_pieces(step: Step) -> Iterator[Piece]:
    """Yields what is read only to be compared: parts that nobody decodes but that must be right."""
    specs = step.input_specs(step.shape)
    for part, content in step.fixed_inputs.items():
        yield Piece(step, {part: Read(step.inputs[part], 0, specs[part])}, {}, 0, content)


def _copy_pieces(step: Step, header: Header, max_nbytes: int) -> Iterator[Piece]:
    names = zip(step.input_specs(step.shape), step.output_specs(step.shape).items(), strict=True)
    for part_in, (part_out, spec) in names:
        # Elements of less than a byte are copied as bytes.
        dtype = spec.dtype if DTYPES[spec.dtype].bits % 8 == 0 else "U8"
        element = DTYPES[dtype].bits // 8
        chunk = max(1, max_nbytes // element) * element
        for start in range(0, spec.nbytes, chunk):
            flat = TensorSpec(dtype, (min(chunk, spec.nbytes - start) // element,))
            offset = header.offsets[step.outputs[part_out]] + start
            yield Piece(
                step,
                {part_out: Read(step.inputs[part_in], start, flat)},
                {part_out: Write(offset, flat)},
                start // element,
            )


def _share_pieces(step: Step, share: Share, header: Header, max_nbytes: int) -> Iterator[Piece]:
    """Yields rows of a rank's part of a tensor, one below or one beside the parts of the other ranks."""
    rows, *rest = step.shape
    width = TensorSpec(step.dtype, (1, *rest)).nbytes
    beside = share.axis == 1
    row_nbytes = width * share.world if beside else width
    start = share.rank * width * (1 if beside else rows)
    height = max(1, max_nbytes // max(1, row_nbytes))
    for top in range(0, rows, height):
        spec = TensorSpec(step.dtype, (min(height, rows - top), *rest))
        source = Read(step.weight, start + top * row_nbytes, spec, row_nbytes if beside else None)
        place = Write(header.offsets[step.outputs["weight"]] + top * width, spec)
        first_element = top * (width // (DTYPES[step.dtype].bits // 8))
        yield Piece(step, {"weight": source}, {"weight": place}, first_element)


def _stripes(step: Step, header: Header, max_nbytes: int) -> Iterator[Piece]:
    assert step.source is not None and step.target is not None
    rows, *rest = step.shape
    together = _rows_together(step.source, step.target, rows)
    unit_in, unit_out = step.input_specs((together, *rest)), step.output_specs((together, *rest))
    known_in, known_out = step.fixed_inputs, step.fixed_outputs
    inputs = {part: ref for part, ref in step.inputs.items() if part not in known_in}
    outputs = {part: name for part, name in step.outputs.items() if part not in known_out}
    unit_nbytes = max(
        1, sum(unit_out[part].nbytes for part in outputs), sum(unit_in[part].nbytes for part in inputs)
    )
    height = max(1, max_nbytes // unit_nbytes) * together
    specs_in, specs_out = step.input_specs((height, *rest)), step.output_specs((height, *rest))
    for first in range(0, rows, height):
        if rows - first < height:
            shape = (rows - first, *rest)
            specs_in, specs_out = step.input_specs(shape), step.output_specs(shape)
        before = first // together
        yield Piece(
            step,
            {part: Read(ref, before * unit_in[part].nbytes, specs_in[part]) for part, ref in inputs.items()},
            {
                part: Write(header.offsets[name] + before * unit_out[part].nbytes, specs_out[part])
                for part, name in outputs.items()
            },
            first * (step.shape[1] if rest else 1),
        )


def _rows_together(source: Format, target: Format, rows: int) -> int:
    """Returns the rows of a weight that both formats keep together: all of them, if one is not by rows."""
    alignments = (source.row_alignment, target.row_alignment)
    return lcm(*(rows if alignment is None else alignment for alignment in alignments))
