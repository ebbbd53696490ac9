"""Cuts the steps of a shard into pieces small enough to be in memory.

Large weights go in stripes of whole rows, aligned to the rows that share a scale; copies in chunks of
bytes. Because the parts of every format are stored row by row, the bytes of a stripe of a part follow
those of the rows before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm

from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.checkpoint.header import Header
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.plan import ShardPlan, Step, TensorRef

__all__ = ["Piece", "Read", "Write", "cut"]


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of a source tensor: from `start`, as many as `spec` has."""

    ref: TensorRef
    start: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes of the output file: at `offset`, as many as `spec` has."""

    offset: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """A stripe of one step: what to read and write of each part, and its first element's index."""

    step: Step
    reads: Mapping[str, Read]
    writes: Mapping[str, Write]
    first_element: int

    @property
    def nbytes_in(self) -> int:
        """Bytes read."""
        return sum(read.spec.nbytes for read in self.reads.values())

    @property
    def nbytes_out(self) -> int:
        """Bytes written."""
        return sum(write.spec.nbytes for write in self.writes.values())


def cut(shard: ShardPlan, header: Header, max_nbytes: int) -> Iterator[Piece]:
    """Yields the pieces of a shard in file order, each writing about `max_nbytes` or less.

    A stripe has at least the rows that its formats keep together, so a very wide weight may exceed
    `max_nbytes`: 128 rows of 18,432 columns in BF16 are 4.7 MB.
    """
    for step in shard.steps:
        yield from (
            _copy_pieces(step, header, max_nbytes) if step.is_copy else _stripes(step, header, max_nbytes)
        )


def _copy_pieces(step: Step, header: Header, max_nbytes: int) -> Iterator[Piece]:
    for part, spec in step.output_specs(step.shape).items():
        # Elements of less than a byte are copied as bytes.
        dtype = spec.dtype if DTYPES[spec.dtype].bits % 8 == 0 else "U8"
        element = DTYPES[dtype].bits // 8
        chunk = max(1, max_nbytes // element) * element
        for start in range(0, spec.nbytes, chunk):
            flat = TensorSpec(dtype, (min(chunk, spec.nbytes - start) // element,))
            offset = header.offsets[step.outputs[part]] + start
            yield Piece(
                step,
                {part: Read(step.inputs[part], start, flat)},
                {part: Write(offset, flat)},
                start // element,
            )


def _stripes(step: Step, header: Header, max_nbytes: int) -> Iterator[Piece]:
    assert step.source is not None and step.target is not None
    rows, *rest = step.shape
    together = lcm(step.source.row_alignment, step.target.row_alignment)
    unit_in, unit_out = step.input_specs((together, *rest)), step.output_specs((together, *rest))
    unit_nbytes = max(1, sum(spec.nbytes for spec in unit_out.values()))
    height = max(1, max_nbytes // unit_nbytes) * together
    specs_in, specs_out = step.input_specs((height, *rest)), step.output_specs((height, *rest))
    for first in range(0, rows, height):
        if rows - first < height:
            shape = (rows - first, *rest)
            specs_in, specs_out = step.input_specs(shape), step.output_specs(shape)
        before = first // together
        yield Piece(
            step,
            {
                part: Read(ref, before * unit_in[part].nbytes, specs_in[part])
                for part, ref in step.inputs.items()
            },
            {
                part: Write(header.offsets[name] + before * unit_out[part].nbytes, specs_out[part])
                for part, name in step.outputs.items()
            },
            first * (step.shape[1] if rest else 1),
        )
