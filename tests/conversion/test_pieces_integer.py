"""Pieces of integer formats and of ranks' shares: nothing missed, nothing twice, the bytes of whole weights.

Plans are made of steps at random, cut, and carried out in memory; numpy's slices say what a share is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_tools.checkpoint.dtypes import DTYPES, torch_dtype
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.checking import check_steps
from dsv3_tools.conversion.pieces import Piece, Read, check_content, cut, read_into
from dsv3_tools.conversion.plan import ShardPlan, Share, Step, TensorRef
from dsv3_tools.errors import CheckpointError, PlanError
from dsv3_tools.formats import (
    INT4,
    INT4AWQ,
    INT4GPTQ,
    Dense,
    Format,
    FP8Block,
    INT4Packed,
    INT8Block,
    INT8Channel,
)
from dsv3_tools.formats.recode import recode_into
from tests.formats.weights import can_store, lay_out, make_grid

SOURCES: list[Format] = [
    Dense(),
    Dense("F32"),
    FP8Block(),
    FP8Block((16, 32)),
    INT8Block((16, 32)),
    INT8Channel(),
    INT8Channel("F16"),
    INT4Packed(32),
    INT4Packed(32, symmetric=False, scale_dtype="F16", shape_dtype="I32"),
    INT4Packed(-1),
    INT4GPTQ(32),
    INT4GPTQ(64, version=2),
    INT4GPTQ(32, symmetric=False),
    INT4GPTQ(32, act_order=True),
    INT4GPTQ(64, symmetric=False, scale_dtype="F16", act_order=True),
    INT4AWQ(32),
    INT4AWQ(64, symmetric=False, scale_dtype="F16"),
]
TARGETS: list[Format] = [
    Dense(),
    Dense("F32"),
    FP8Block((16, 32)),
    INT8Block((16, 32)),
    INT8Channel(),
    INT4Packed(32),
    INT4Packed(64, search="absmax"),
    INT4Packed(32, symmetric=False, search="absmax"),
    INT4GPTQ(32),
    INT4GPTQ(64, version=2, search="absmax"),
    INT4AWQ(32),
    INT4AWQ(64, symmetric=False, search="absmax"),
]
MAX_NBYTES = st.sampled_from([1, 700, 4096, 20_000, 1 << 20])


class Job(NamedTuple):
    """A step, what its inputs hold, and what its outputs shall hold."""

    step: Step
    inputs: Mapping[TensorRef, bytes]
    outputs: Mapping[str, bytes]


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def as_tensor(data: bytes | bytearray, spec: TensorSpec) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return flat.view(torch_dtype(spec.dtype)).reshape(spec.shape)


def make_parts(fmt: Format, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Returns the parts of some weight; groups of columns at random where the format has an order."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(fmt, INT4):
        parts = lay_out(fmt, make_grid(fmt, shape, seed))
        if isinstance(fmt, INT4GPTQ) and fmt.act_order:
            order = torch.randperm(shape[1], generator=generator)
            parts["g_idx"] = parts["g_idx"][order].contiguous()
        return parts
    weight = torch.randn(shape, generator=generator) * 0.02
    if isinstance(fmt, INT8Channel):
        parts = INT8Channel().encode(weight)
        return parts | {"weight_scale": parts["weight_scale"].to(torch_dtype(fmt.scale_dtype))}
    return fmt.encode(weight)


def recode_job(source: Format, target: Format, shape: tuple[int, int], name: str, seed: int = 0) -> Job:
    """Returns the recoding of a weight, its expected outputs made of it whole."""
    item = make_parts(source, shape, seed)
    inputs = {part: TensorRef(f"{name}.{part}") for part in item}
    outputs = {part: f"{name}.{part}" for part in target.part_names}
    step = Step(shape, inputs, outputs, source, target, source.code_dtype)
    if step.is_copy:
        made = dict(item)
    else:
        made = {
            part: torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype))
            for part, spec in target.parts(shape).items()
        }
        recode_into(source, target, [item], [made])
    expected = {outputs[part]: as_bytes(tensor) for part, tensor in made.items()}
    if not step.is_copy:
        expected |= {outputs[part]: content for part, content in target.fixed(shape).items()}
    return Job(step, {inputs[part]: as_bytes(tensor) for part, tensor in item.items()}, expected)


def random_bytes(nbytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def share_jobs(name: str, spec: TensorSpec, world: int, axis: int | None, seed: int = 0) -> list[Job]:
    """Returns a copy of a tensor for each of `world` ranks; `spec` is that of a rank's part."""
    whole = Share(0, world, axis).whole(spec.shape)
    data = random_bytes(TensorSpec(spec.dtype, whole).nbytes, seed)
    elements = np.frombuffer(data, np.uint8).reshape(*whole, DTYPES[spec.dtype].bits // 8)
    parts = [elements] * world if axis is None else np.split(elements, world, axis)
    ref = TensorRef(name)
    copy = Step(spec.shape, {"weight": ref}, {"weight": name}, None, None, spec.dtype)
    return [
        Job(replace(copy, share=Share(rank, world, axis)), {ref: data}, {name: part.tobytes()})
        for rank, part in enumerate(parts)
    ]


# Carried out in memory.


class Memory:
    """The one method of a checkpoint that pieces need."""

    def __init__(self, tensors: Mapping[TensorRef, bytes]) -> None:
        self._tensors = {ref.name: data for ref, data in tensors.items()}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        data = self._tensors[name][start : start + len(buffer)]
        assert len(data) == len(buffer), f"{name}: reads past the end"
        buffer[:] = data


def run(pieces: Sequence[Piece], tensors: Mapping[TensorRef, bytes], file: bytearray) -> None:
    """Reads, recodes and writes as a pipeline does."""
    checkpoints: Any = {"source": Memory(tensors)}
    for piece in pieces:
        if piece.content is not None and piece.reads:
            assert not piece.writes
            (read,) = piece.reads.values()
            buffer = bytearray(read.spec.nbytes)
            read_into(checkpoints, read, memoryview(buffer))
            check_content(piece, memoryview(buffer))
            continue
        if piece.content is not None:
            (write,) = piece.writes.values()
            assert len(piece.content) == write.spec.nbytes
            file[write.offset : write.offset + write.spec.nbytes] = piece.content
            continue
        items = {}
        for part, read in piece.reads.items():
            buffer = bytearray(read.spec.nbytes)
            read_into(checkpoints, read, memoryview(buffer))
            items[part] = as_tensor(buffer, read.spec)
        outs = items
        if piece.is_coded:
            assert piece.step.source is not None
            assert piece.step.target is not None
            outs = {
                part: torch.zeros(write.spec.shape, dtype=torch_dtype(write.spec.dtype))
                for part, write in piece.writes.items()
            }
            recode_into(piece.step.source, piece.step.target, [items], [outs])
        for part, write in piece.writes.items():
            data = as_bytes(outs[part])
            assert len(data) == write.spec.nbytes
            file[write.offset : write.offset + len(data)] = data


def ranges(read: Read) -> Iterator[tuple[int, int]]:
    """Yields the (start, end) of every run of bytes that a read takes."""
    if read.row_nbytes is None:
        yield read.start, read.start + read.spec.nbytes
        return
    rows = read.spec.shape[0]
    width = read.spec.nbytes // rows
    for row in range(rows):
        start = read.start + row * read.row_nbytes
        yield start, start + width


def count_reads(pieces: Sequence[Piece], tensors: Mapping[TensorRef, bytes]) -> dict[TensorRef, Tensor]:
    counts = {ref: torch.zeros(len(data), dtype=torch.uint8) for ref, data in tensors.items()}
    for piece in pieces:
        for read in piece.reads.values():
            for start, end in ranges(read):
                assert end <= len(counts[read.ref])
                counts[read.ref][start:end] += 1
    return counts


def count_writes(pieces: Sequence[Piece], nbytes: int) -> Tensor:
    counts = torch.zeros(nbytes, dtype=torch.uint8)
    for piece in pieces:
        for write in piece.writes.values():
            assert write.offset + write.spec.nbytes <= nbytes
            counts[write.offset : write.offset + write.spec.nbytes] += 1
    return counts


def check(jobs: Sequence[Job], max_nbytes: int) -> list[Piece]:
    """Cuts and carries out a shard of these steps; returns its pieces."""
    shard = ShardPlan.build("model-00001-of-000001.safetensors", [job.step for job in jobs])
    _, header = shard.header()
    pieces = list(cut(shard, header, max_nbytes))
    check_pieces(jobs, shard, pieces, max_nbytes)
    return pieces


def check_pieces(jobs: Sequence[Job], shard: ShardPlan, pieces: Sequence[Piece], max_nbytes: int) -> None:
    encoded, header = shard.header()
    tensors = {ref: data for job in jobs for ref, data in job.inputs.items()}
    counts = count_writes(pieces, header.file_nbytes)
    assert (counts[: len(encoded)] == 0).all()
    assert (counts[len(encoded) :] == 1).all()
    reads = count_reads(pieces, tensors)
    for job in jobs:
        fixed = {job.step.inputs[part] for part in job.step.fixed_inputs}
        for ref in job.inputs:
            if job.step.share is None:
                assert (reads[ref] == 1).all(), (ref, ref in fixed)
    for piece in pieces:
        check_piece(piece, max_nbytes)
    known = [piece.content is None or not piece.writes for piece in pieces]
    assert known == sorted(known), "what is known beforehand comes first"
    file = bytearray(b"\xa5" * header.file_nbytes)
    run(pieces, tensors, file)
    for job in jobs:
        for name, expected in job.outputs.items():
            start = header.offsets[name]
            assert file[start : start + len(expected)] == expected, name


def check_piece(piece: Piece, max_nbytes: int) -> None:
    step = piece.step
    if piece.content is not None:
        return
    assert piece.nbytes_out > 0
    if not piece.is_coded:
        row_nbytes = TensorSpec(step.dtype, (1, *step.shape[1:])).nbytes
        assert piece.nbytes_out <= max(max_nbytes, 8 if step.share is None else row_nbytes)
        return
    assert step.source is not None
    assert step.target is not None
    rows = step.source.shape_of(piece.reads[step.source.weight_part].spec.shape)[0]
    row = piece.first_element // step.shape[1]
    assert piece.first_element == row * step.shape[1]
    assert set(piece.reads) == set(step.inputs) - set(step.fixed_inputs)
    assert set(piece.writes) == set(step.outputs) - set(step.fixed_outputs)
    assert step.target.shape_of(piece.writes[step.target.weight_part].spec.shape) == (rows, step.shape[1])
    for alignment in (step.source.row_alignment, step.target.row_alignment):
        if alignment is None:
            assert (row, rows) == (0, step.shape[0]), "a weight that is not stored by rows is one piece"
        else:
            assert row % alignment == 0
            assert rows % alignment == 0 or row + rows == step.shape[0]


@st.composite
def jobs_of_a_shard(draw: st.DrawFn) -> list[Job]:
    jobs = []
    for number in range(draw(st.integers(1, 4))):
        source, target = draw(st.sampled_from(SOURCES)), draw(st.sampled_from(TARGETS))
        shape = (draw(st.integers(1, 320)), 64 * draw(st.integers(1, 5)))
        if not (can_store(source, shape) and can_store(target, shape)):
            shape = (8 * -(-shape[0] // 8), shape[1])
        name = f"t{draw(st.integers(0, 9))}.{number}"
        jobs.append(recode_job(source, target, shape, name, draw(st.integers(0, 99))))
    return jobs


@settings(max_examples=120, deadline=None, derandomize=True)
@given(jobs=jobs_of_a_shard(), max_nbytes=MAX_NBYTES)
def test_pieces_make_the_bytes_of_whole_weights(jobs: list[Job], max_nbytes: int) -> None:
    check(jobs, max_nbytes)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_source_to_every_target_in_small_pieces(target: Format) -> None:
    """Rows that neither 16 nor 128 divides."""
    for number, source in enumerate(SOURCES):
        check([recode_job(source, target, (136, 192), "w", number)], 4096)


@pytest.mark.parametrize(
    ("source", "target", "count"),
    [
        (Dense(), INT4Packed(32), 68),  # 136 rows of 384 bytes, 2 in 1,000 bytes
        (Dense(), INT4Packed(32, symmetric=False), 17),  # 8 rows and 24 bytes of their zero points
        (INT4Packed(32), INT4Packed(32, scale_dtype="BF16", shape_dtype="I32"), 16),  # rows of 96 + 12 bytes
        (Dense(), INT8Channel(), 68),
        (INT8Channel(), Dense(), 68),
        (FP8Block(), INT4Packed(32), 2),
        (Dense(), INT4GPTQ(32), 1),
        (INT4AWQ(32), Dense(), 1),
        (INT4GPTQ(32), INT4GPTQ(32, version=2), 1),
    ],
    ids=str,
)
def test_how_finely_formats_are_divided(source: Format, target: Format, count: int) -> None:
    pieces = check([recode_job(source, target, (136, 192), "w")], 1000)
    assert len([piece for piece in pieces if piece.content is None]) == count
    known = [piece for piece in pieces if piece.content is not None]
    assert len([piece for piece in known if piece.writes]) == len(target.fixed((136, 192)))
    assert len([piece for piece in known if piece.reads]) == len(source.fixed((136, 192)))


def test_what_follows_from_the_shape_is_written_and_compared() -> None:
    for source, target, unread, known in (
        (INT4Packed(32), INT4GPTQ(32), {"weight_shape"}, {"qzeros", "g_idx"}),
        (INT4GPTQ(32), INT4Packed(32), {"qzeros", "g_idx"}, {"weight_shape"}),
        (INT4GPTQ(32, act_order=True), Dense(), {"qzeros"}, set()),
        (INT4GPTQ(32, symmetric=False), Dense(), {"g_idx"}, set()),
        (INT4AWQ(32, symmetric=False), INT4Packed(32, symmetric=False), set(), {"weight_shape"}),
    ):
        job = recode_job(source, target, (16, 192), "w")
        pieces = check([job], 1 << 20)
        assert set(job.step.fixed_inputs) == unread
        assert {part for piece in pieces if piece.content is not None for part in piece.writes} == known
        assert {part for piece in pieces if piece.content is not None for part in piece.reads} == unread


@pytest.mark.parametrize(
    "fmt", [fmt for fmt in SOURCES if not isinstance(fmt, (INT8Channel, Dense))], ids=str
)
def test_equal_formats_are_copied_byte_by_byte(fmt: Format) -> None:
    """What follows from the shape as well, whatever it holds."""
    job = recode_job(fmt, fmt, (24, 192), "w")
    assert job.step.is_copy
    assert job.step.fixed_inputs == job.step.fixed_outputs == {}
    for max_nbytes in (100, 1 << 20):
        pieces = check([job], max_nbytes)
        assert not any(piece.is_coded for piece in pieces)
        assert all(piece.content is None for piece in pieces)


def test_scales_that_become_powers_of_two_are_no_copy() -> None:
    ue8m0 = FP8Block(scale_fmt="ue8m0")
    assert not recode_job(FP8Block(), ue8m0, (24, 192), "w").step.is_copy
    assert recode_job(ue8m0, FP8Block(), (24, 192), "w").step.is_copy
    check([recode_job(FP8Block(), ue8m0, (24, 192), "w")], 1000)


def test_negative_control_wrong_pieces_are_noticed() -> None:
    jobs = [
        recode_job(Dense(), INT4Packed(32), (136, 192), "a"),
        recode_job(INT4Packed(32), INT4GPTQ(32), (16, 192), "b"),
        recode_job(INT4Packed(32, symmetric=False), INT8Channel(), (24, 64), "c"),
    ]
    shard = ShardPlan.build("x", [job.step for job in jobs])
    pieces = list(cut(shard, shard.header()[1], 1000))
    check_pieces(jobs, shard, pieces, 1000)
    first, second = [piece for piece in pieces if piece.step == jobs[0].step and piece.content is None][:2]
    others = {id(first): second.writes, id(second): first.writes}
    swapped = [replace(piece, writes=others.get(id(piece), piece.writes)) for piece in pieces]
    altered = [
        piece if piece.content is None else replace(piece, content=bytes(len(piece.content)))
        for piece in pieces
    ]
    for wrong in (pieces[1:], pieces[:-1], [*pieces, pieces[0]], pieces[::-1], swapped, altered):
        with pytest.raises((AssertionError, CheckpointError)):
            check_pieces(jobs, shard, wrong, 1000)


# Shares of ranks.


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[Job], int, int | None]:
    world, axis = draw(st.sampled_from([1, 2, 3, 8])), draw(st.sampled_from([0, 1, None]))
    dtype = draw(st.sampled_from(["BF16", "F32", "F8_E4M3", "I32", "F64"]))
    least = 2 if axis == 1 else 1
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=least, max_size=3)))
    return share_jobs("model.w", TensorSpec(dtype, shape), world, axis, draw(st.integers(0, 99))), world, axis


@settings(max_examples=150, deadline=None, derandomize=True)
@given(made=shares(), max_nbytes=st.sampled_from([1, 100, 1000, 1 << 20]))
def test_shares_are_numpy_s_slices(made: tuple[list[Job], int, int | None], max_nbytes: int) -> None:
    """Every rank has its own file; between them they read every byte once, or once each."""
    jobs, world, axis = made
    every: list[Piece] = []
    for rank, job in enumerate(jobs):
        pieces = check([job], max_nbytes)
        assert all(piece.step.share == Share(rank, world, axis) for piece in pieces)
        every += pieces
    for count in count_reads(every, jobs[0].inputs).values():
        assert (count == (world if axis is None else 1)).all()
    specs = {"source": {"model.w": TensorSpec(job.step.dtype, Share(0, world, axis).whole(job.step.shape))}}
    check_steps("here", specs, [job.step for job in jobs], dropped={}, refused={})


def test_shares_byte_by_byte() -> None:
    """3 x 4 elements of a byte, for 2 ranks."""
    data = bytes(range(12))
    ref = TensorRef("w")
    for axis, shape, expected in (
        (0, (2, 4), ["0001020304050607", "08090a0b0c0d0e0f"]),
        (1, (3, 2), ["000104050809", "020306070a0b"]),
        (None, (3, 4), ["000102030405060708090a0b"] * 2),
    ):
        whole = bytes(range(16)) if axis == 0 else data
        for rank, text in enumerate(expected):
            share = Share(rank, 2, axis)
            step = Step(shape, {"weight": ref}, {"weight": "w"}, None, None, "U8", share)
            check([Job(step, {ref: whole}, {"w": bytes.fromhex(text)})], 5)


def test_negative_control_another_rank_s_share_is_noticed() -> None:
    for axis in (0, 1):
        jobs = share_jobs("w", TensorSpec("BF16", (4, 6)), 2, axis)
        wrong = Job(replace(jobs[0].step, share=jobs[1].step.share), jobs[0].inputs, jobs[0].outputs)
        with pytest.raises(AssertionError):
            check([wrong], 20)


def test_a_share_beside_others_is_read_in_rows_of_all() -> None:
    (job, _) = share_jobs("w", TensorSpec("BF16", (10, 64)), 2, 1)
    pieces = check([job], 600)  # 2 rows of 256 bytes
    assert [piece.reads["weight"].spec.shape for piece in pieces] == [(2, 64)] * 5
    assert {piece.reads["weight"].row_nbytes for piece in pieces} == {256}
    assert [piece.first_element for piece in pieces] == [0, 128, 256, 384, 512]


# Steps of ranks that do not add up.

WHOLE = {"source": {"w": TensorSpec("BF16", (8, 12)), "n": TensorSpec("BF16", (12,))}}


def problems(made: list[Step], **others: Any) -> tuple[str, ...]:
    try:
        check_steps("here", WHOLE, made, dropped=others.get("dropped", {}), refused={})
    except PlanError as error:
        return error.problems
    return ()


def steps_of(axis: int | None, world: int = 2, name: str = "w") -> list[Step]:
    shape = [*WHOLE["source"][name].shape]
    if axis is not None:
        shape[axis] //= world
    return [job.step for job in share_jobs(name, TensorSpec("BF16", tuple(shape)), world, axis)]


NORM = steps_of(None, name="n")


@pytest.mark.parametrize("axis", [0, 1, None])
def test_shares_that_add_up(axis: int | None) -> None:
    for world in (1, 2, 4):
        assert problems(steps_of(axis, world) + steps_of(None, world, "n")) == ()
        assert problems((steps_of(axis, world) + steps_of(None, world, "n"))[::-1]) == ()


@pytest.mark.parametrize("axis", [0, 1, None])
def test_shares_that_do_not_add_up(axis: int | None) -> None:
    first, second = steps_of(axis)
    assert problems([first, *NORM]) == ("w would be used 1 times",)
    assert problems([second, *NORM]) == ("w would be used 1 times",)
    assert problems([first, first, *NORM]) == ("w would be used 2 times", "w would be written 2 times")
    assert problems([first, second, second, *NORM]) == (
        "w would be used 3 times",
        "w would be written 2 times",
    )
    assert problems([*NORM]) == ("w is used by no step",)
    assert problems([first, second, *NORM], dropped={"w": "no"}) == ("w would be used 3 times",)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 0), (0, None), (None, 0), (1, None)])
def test_shares_of_mixed_axes(one: int | None, other: int | None) -> None:
    assert problems([steps_of(one)[0], steps_of(other)[1], *NORM]) == ("w would be used 2 times",)


def test_shares_of_different_worlds() -> None:
    mixed = [steps_of(0, 2)[0], steps_of(0, 4)[1], *NORM]
    assert problems(mixed) == ("w would be used 2 times",)


def test_a_share_and_the_whole() -> None:
    whole = Step.copy("w", WHOLE["source"]["w"])
    for made in ([steps_of(0)[0], whole], [whole, steps_of(0)[0]], [*steps_of(0), whole]):
        assert f"w would be used {len(made)} times" in problems([*made, *NORM])


def test_a_share_that_does_not_divide_its_tensor() -> None:
    wrong = [replace(step, shape=(3, 12)) for step in steps_of(0)]
    found = problems([*wrong, *NORM])
    assert found == ("w is BF16 [8, 12], expected BF16 [6, 12] for a weight BF16 [3, 12]",) * 2
    too_many = [job.step for job in share_jobs("w", TensorSpec("BF16", (2, 12)), 8, 0)]
    assert len(problems([*too_many, *NORM])) == 8


# Shapes that a target refuses.


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (INT4Packed(128), (16, 192)),
        (INT4Packed(64, symmetric=False), (12, 64)),
        (INT4GPTQ(), (12, 128)),
        (INT4AWQ(), (12, 128)),
        (INT8Block(), (16,)),
        (INT8Channel(), (2, 16, 16)),
    ],
    ids=str,
)
def test_a_weight_that_its_target_cannot_store_is_named(target: Format, shape: tuple[int, ...]) -> None:
    outputs = {part: f"x.{part}" for part in target.part_names}
    step = Step(shape, {"weight": TensorRef("x.weight")}, outputs, Dense(), target, "BF16")
    specs = {"source": {"x.weight": TensorSpec("BF16", shape)}}
    with pytest.raises(PlanError) as caught:
        check_steps("here", specs, [step], dropped={}, refused={})
    (problem,) = caught.value.problems
    assert problem.startswith(f"x.weight: {target.name}: got a weight of shape {list(shape)}, expected ")
