"""Planning: the whole of DeepSeek-V3 in seconds, pieces that miss and repeat nothing, plans that refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from math import lcm
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3_tools
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.checking import check_steps
from dsv3_tools.conversion.pieces import Piece, cut
from dsv3_tools.conversion.plan import Plan, ShardPlan, Step, TensorRef
from dsv3_tools.conversion.recode import plan_bf16_to_fp8, plan_fp8_to_bf16
from dsv3_tools.errors import PlanError
from dsv3_tools.formats import Dense, FP8Block
from dsv3_tools.formats.fp8_block import LIKE_PART

FP8_NBYTES = 688_574_839_360
BF16_NBYTES = 1_368_979_721_216

PLAN = """
import json, sys, time
from pathlib import Path
began = time.perf_counter()
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion import recode
with Checkpoint(sys.argv[2]) as checkpoint:
    plan = getattr(recode, sys.argv[1])(checkpoint)
    found = {
        "in": plan.nbytes_in,
        "out": plan.payload_nbytes,
        "shards": len(plan.shards),
        "tensors_in": len(checkpoint.specs),
        "tensors_out": plan.num_tensors_out,
        "parameters": plan.total_parameters,
        "index": len(plan.index()),
        "digest": plan.digest,
    }
found["seconds"] = time.perf_counter() - began
# Not getrusage: its maximum is inherited from the process that forked this one.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
found["kib"] = int(status["VmHWM"].split()[0])
found["heavy"] = [name for name in ("torch", "numba") if name in sys.modules]
print(json.dumps(found))
"""


def plan_in_a_process(planner: str, checkpoint: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", PLAN, planner, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("weights", "planner", "nbytes_in", "nbytes_out", "tensors_in", "tensors_out"),
    [
        ("fp8", "plan_fp8_to_bf16", FP8_NBYTES, BF16_NBYTES, 91_991, 46_183),
        ("bf16", "plan_bf16_to_fp8", BF16_NBYTES, FP8_NBYTES, 46_183, 91_991),
    ],
)
def test_deepseek_v3(
    tmp_path: Path,
    weights: str,
    planner: str,
    nbytes_in: int,
    nbytes_out: int,
    tensors_in: int,
    tensors_out: int,
) -> None:
    dsv3_tools.sample(tmp_path / "v3", weights=weights, sparse=True)
    found = plan_in_a_process(planner, tmp_path / "v3")
    assert (found["in"], found["out"]) == (nbytes_in, nbytes_out)
    assert (found["tensors_in"], found["tensors_out"]) == (tensors_in, tensors_out)
    assert (found["shards"], found["parameters"]) == (163, 684_489_845_504)
    assert found["index"] > 1_000_000
    assert found["heavy"] == []
    assert found["seconds"] <= 40, "about 4 s; the bound leaves room for a busy machine"
    assert found["kib"] <= 600 * 1000


# Pieces.

FP8, FP8_SMALL = FP8Block(), FP8Block(block_size=(16, 32))
SIDES = st.integers(1, 400)


@st.composite
def steps(draw: st.DrawFn, number: int) -> Step:
    name = f"t{draw(st.integers(0, 9))}.{number}"
    kind = draw(st.sampled_from(["copy", "dequantize", "quantize", "like", "requantize"]))
    if kind == "copy":
        dtype = draw(st.sampled_from(["BF16", "F32", "F16", "F64", "F8_E4M3", "I32"]))
        shape = tuple(draw(st.lists(st.integers(0, 90), max_size=3)))
        return Step.copy(name, TensorSpec(dtype, shape))
    shape = (draw(SIDES), draw(SIDES))
    fp8 = draw(st.sampled_from([FP8, FP8_SMALL]))
    dense = Dense(draw(st.sampled_from(["BF16", "F32"])))
    scale = f"{name}_scale_inv"
    weight, scales = TensorRef(name), TensorRef(scale)
    both = {"weight": name, "weight_scale_inv": scale}
    if kind == "dequantize":
        return Step(
            shape, {"weight": weight, "weight_scale_inv": scales}, {"weight": name}, fp8, dense, "F8_E4M3"
        )
    if kind == "requantize":
        other = FP8Block(block_size=(48, 40))
        return Step(shape, {"weight": weight, "weight_scale_inv": scales}, both, other, fp8, "F8_E4M3")
    inputs = {"weight": weight} | ({LIKE_PART: TensorRef(scale, "like")} if kind == "like" else {})
    return Step(shape, inputs, both, dense, fp8, dense.dtype)


@st.composite
def shards(draw: st.DrawFn) -> ShardPlan:
    made = [draw(steps(number)) for number in range(draw(st.integers(1, 6)))]
    return ShardPlan.build("model-00001-of-000001.safetensors", made)


def tiles(ranges: list[tuple[int, int]], begin: int, end: int) -> bool:
    """Whether ranges (start, nbytes) cover begin to end without gap or overlap, whatever their order."""
    position = begin
    for start, nbytes in sorted(r for r in ranges if r[1]):
        if start != position:
            return False
        position += nbytes
    return position == end


def check_pieces(shard: ShardPlan, pieces: list[Piece], max_nbytes: int) -> None:
    encoded, header = shard.header()
    assert shard.nbytes == header.file_nbytes == len(encoded) + sum(s.nbytes for s in shard.specs().values())
    written = [(w.offset, w.spec.nbytes) for piece in pieces for w in piece.writes.values()]
    assert tiles(written, header.nbytes, header.file_nbytes)
    read: dict[TensorRef, list[tuple[int, int]]] = defaultdict(list)
    expected: dict[TensorRef, int] = {}
    for piece in pieces:
        for found in piece.reads.values():
            read[found.ref].append((found.start, found.spec.nbytes))
    for step in shard.steps:
        for part, spec in step.input_specs(step.shape).items():
            expected[step.inputs[part]] = spec.nbytes
    for ref, nbytes in expected.items():
        assert tiles(read[ref], 0, nbytes), ref
        assert read[ref] == sorted(read[ref])
    assert read.keys() <= expected.keys()
    order = [shard.steps.index(piece.step) for piece in pieces]
    assert order == sorted(order)
    starts = [min(header.offsets[name] for name in step.outputs.values()) for step in shard.steps]
    assert starts == sorted(starts)
    for piece in pieces:
        check_piece(piece, max_nbytes)


def check_piece(piece: Piece, max_nbytes: int) -> None:
    step, weight = piece.step, piece.reads["weight"]
    assert piece.writes.keys() == step.outputs.keys()
    assert piece.reads.keys() == step.inputs.keys()
    if step.is_copy:
        assert 0 < piece.nbytes_out == piece.nbytes_in <= max_nbytes
        assert piece.first_element * (weight.spec.nbytes // weight.spec.num_elements) == weight.start
        return
    assert step.source is not None
    assert step.target is not None
    shape = weight.spec.shape
    for part, spec in step.input_specs(shape).items():
        assert piece.reads[part].spec == spec
    for part, spec in step.output_specs(shape).items():
        assert piece.writes[part].spec == spec
    row = piece.first_element // step.shape[1]
    assert piece.first_element == row * step.shape[1]
    assert row % step.source.row_alignment == 0
    assert row % step.target.row_alignment == 0
    is_last = row + shape[0] == step.shape[0]
    together = lcm(step.source.row_alignment, step.target.row_alignment)
    if not is_last:
        assert shape[0] % together == 0
    # A row's bytes are an average over the rows that share scales, rounded down.
    assert piece.nbytes_out <= max_nbytes + shape[0] or shape[0] <= together


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shard=shards(), max_nbytes=st.sampled_from([4096, 5000, 16384, 100_000, 1 << 20]))
def test_pieces_cover_every_byte_once(shard: ShardPlan, max_nbytes: int) -> None:
    _, header = shard.header()
    check_pieces(shard, list(cut(shard, header, max_nbytes)), max_nbytes)


def test_negative_control_a_piece_too_few_or_twice_is_noticed() -> None:
    weight = Step(
        (300, 200), {"weight": TensorRef("a")}, {"weight": "a", "weight_scale_inv": "s"}, Dense(), FP8, "BF16"
    )
    shard = ShardPlan.build("x", [weight, Step.copy("b", TensorSpec("F32", (5000,)))])
    pieces = list(cut(shard, shard.header()[1], 4096))
    check_pieces(shard, pieces, 4096)
    assert len(pieces) == 3 + 5
    for wrong in (pieces[1:], pieces[:-1], [*pieces, pieces[0]], pieces[::-1]):
        with pytest.raises(AssertionError):
            check_pieces(shard, wrong, 4096)


def test_stripes_of_a_released_weight_are_small() -> None:
    """The largest linear of DeepSeek-V3 goes in stripes of a few megabytes, by whole rows of blocks."""
    inputs = {"weight": TensorRef("w"), "weight_scale_inv": TensorRef("s")}
    step = Step((18432, 7168), inputs, {"weight": "w"}, FP8, Dense(), "F8_E4M3")
    shard = ShardPlan.build("x", [step])
    pieces = list(cut(shard, shard.header()[1], 4 << 20))
    assert {piece.reads["weight"].spec.shape for piece in pieces} == {(256, 7168)}
    assert max(piece.nbytes_out for piece in pieces) <= 4 << 20


# Layout.


@pytest.mark.parametrize("max_shard_size", [None, 1, 50_000, 300_000, 10**12])
@pytest.mark.parametrize("direction", ["fp8-to-bf16", "bf16-to-fp8"])
def test_layout(
    fp8_checkpoint: Path, bf16_checkpoint: Path, direction: str, max_shard_size: int | None
) -> None:
    is_down = direction == "fp8-to-bf16"
    with Checkpoint(fp8_checkpoint if is_down else bf16_checkpoint) as checkpoint:
        planner: Any = plan_fp8_to_bf16 if is_down else plan_bf16_to_fp8
        plan = planner(checkpoint, max_shard_size=max_shard_size)
        names = [name for shard in plan.shards for name in shard.specs()]
        assert len(set(names)) == len(names) == plan.num_tensors_out
        count = len(plan.shards)
        assert [shard.name for shard in plan.shards] == [
            f"model-{number:05d}-of-{count:06d}.safetensors" for number in range(1, count + 1)
        ]
        home = {name: number for number, shard in enumerate(plan.shards) for name in shard.specs()}
        order = sorted((name for name in home if not name.endswith("_scale_inv")), key=checkpoint.location)
        assert [home[name] for name in order] == sorted(home[name] for name in order)
        for name, number in home.items():
            assert home[name.removesuffix("_scale_inv")] == number
        for shard in plan.shards:
            payload = sum(spec.nbytes for spec in shard.specs().values())
            if max_shard_size is not None:
                assert payload <= max_shard_size or len(shard.steps) == 1
        if max_shard_size is None:
            sources = {checkpoint.weight_map[name] for name in order}
            assert count == len(sources)
        elif max_shard_size == 1:
            assert count == sum(len(shard.steps) for shard in plan.shards)
        elif max_shard_size == 10**12:
            assert count == 1


# Refusals.

COPY = Step.copy("a", TensorSpec("F32", (4,)))
WEIGHT = Step(
    (300, 200),
    {"weight": TensorRef("w"), "weight_scale_inv": TensorRef("w_scale_inv")},
    {"weight": "w"},
    FP8,
    Dense(),
    "F8_E4M3",
)
SPECS = {
    "a": TensorSpec("F32", (4,)),
    "w": TensorSpec("F8_E4M3", (300, 200)),
    "w_scale_inv": TensorSpec("F32", (3, 2)),
}


def problems(
    made: list[Step],
    specs: dict[str, TensorSpec] | None = None,
    *,
    dropped: dict[str, str] | None = None,
    refused: dict[str, str] | None = None,
) -> tuple[str, ...]:
    origins = {"source": SPECS if specs is None else specs}
    try:
        check_steps("here", origins, made, dropped=dropped or {}, refused=refused or {})
    except PlanError as error:
        return error.problems
    return ()


def test_negative_control_steps_that_add_up() -> None:
    assert problems([COPY, WEIGHT]) == ()
    assert problems([WEIGHT], dropped={"a": "not wanted"}) == ()


def test_refusals() -> None:
    assert problems([WEIGHT]) == ("a is used by no step",)
    assert problems([COPY, COPY, WEIGHT]) == ("a would be used 2 times", "a would be written 2 times")
    assert problems([COPY, WEIGHT], dropped={"a": "no"}) == ("a would be used 2 times",)
    assert problems([COPY, WEIGHT], refused={"a": "is odd"}) == ("a is odd",)
    assert problems([WEIGHT], refused={"a": "is odd"}) == ("a is odd",)
    assert problems([COPY, WEIGHT], dropped={"gone": "no"}) == ("gone is missing",)
    without = {name: spec for name, spec in SPECS.items() if name != "w_scale_inv"}
    assert problems([COPY, WEIGHT], without) == ("w_scale_inv is missing",)


@pytest.mark.parametrize(
    "shape", [(1, 2), (3, 1), (1, 1), (2, 3), (3, 3), (6,), (3, 2, 1), (300, 2)], ids=str
)
def test_a_scale_of_another_shape_is_refused_even_if_it_would_broadcast(shape: tuple[int, ...]) -> None:
    (found,) = problems([COPY, WEIGHT], SPECS | {"w_scale_inv": TensorSpec("F32", shape)})
    assert found.startswith(f"w_scale_inv is F32 {list(shape)}, expected F32 [3, 2] for a weight")


def test_other_dtypes_and_shapes_are_refused() -> None:
    (found,) = problems([COPY, WEIGHT], SPECS | {"w_scale_inv": TensorSpec("BF16", (3, 2))})
    assert "is BF16 [3, 2], expected F32 [3, 2]" in found
    vector = Step((300,), WEIGHT.inputs, {"weight": "w"}, FP8, Dense(), "F8_E4M3")
    specs = SPECS | {"w": TensorSpec("F8_E4M3", (300,))}
    assert any("expected two dimensions" in problem for problem in problems([COPY, vector], specs))


def test_all_problems_are_listed() -> None:
    many = {f"n{number}": TensorSpec("F32", (1,)) for number in range(30)}
    with pytest.raises(PlanError) as caught:
        check_steps("here", {"source": many}, [], dropped={}, refused={})
    assert len(caught.value.problems) == 30
    assert str(caught.value).startswith("here: 30 problems: n0 is used by no step; ")
    assert str(caught.value).endswith("; and 10 more")


# The digest.


def plan_of(checkpoint: Path, **options: Any) -> Plan:
    with Checkpoint(checkpoint) as opened:
        return plan_fp8_to_bf16(opened, partial=True, **options)


def touch(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + nanoseconds))


def edit_config(checkpoint: Path) -> None:
    times = (checkpoint / "config.json").stat()
    document = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(document | {"rope_theta": 10001}, indent=2) + "\n")
    os.utime(checkpoint / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))


def edit_tokenizer(checkpoint: Path) -> None:
    times = (checkpoint / "tokenizer.json").stat()
    (checkpoint / "tokenizer.json").write_text("[]\n")
    os.utime(checkpoint / "tokenizer.json", ns=(times.st_atime_ns, times.st_mtime_ns))


def rename_tensor(checkpoint: Path) -> None:
    """Only the header's bytes change: size and time of the file stay."""
    old, new = b"model.layers.2.mlp.experts.7.up_proj", b"model.layers.2.mlp.experts.9.up_proj"
    for path in [*checkpoint.glob("*.safetensors"), checkpoint / "model.safetensors.index.json"]:
        times = path.stat()
        path.write_bytes(path.read_bytes().replace(old, new))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a shard's time": lambda path: touch(path / "model-00002-of-000004.safetensors", 1),
    "the tokenizer": edit_tokenizer,
    "the config": edit_config,
    "a header": rename_tensor,
    "another file": lambda path: (path / "vocab.json").write_text("{}"),
    "a file less": lambda path: (path / "LICENSE").unlink(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_follows_the_source(fp8_checkpoint: Path, copied, name: str) -> None:
    checkpoint = copied(fp8_checkpoint)
    before = plan_of(checkpoint).digest
    CHANGES[name](checkpoint)
    assert plan_of(checkpoint).digest != before


def test_the_digest_ignores_the_times_of_small_files(fp8_checkpoint: Path, copied) -> None:
    checkpoint = copied(fp8_checkpoint)
    before = plan_of(checkpoint).digest
    touch(checkpoint / "tokenizer.json", 1)
    touch(checkpoint / "config.json", 1)
    assert plan_of(checkpoint).digest == before


def test_the_digest_follows_the_options(fp8_checkpoint: Path, bf16_checkpoint: Path) -> None:
    digests = {
        plan_of(fp8_checkpoint, **options).digest
        for options in (
            {},
            {"max_shard_size": 10**6},
            {"max_shard_size": 10**9},
            {"scale_semantics": "inverse"},
        )
    }
    assert len(digests) == 4
    with Checkpoint(bf16_checkpoint) as source, Checkpoint(fp8_checkpoint) as like:
        plans = [
            plan_bf16_to_fp8(source),
            plan_bf16_to_fp8(source, scale_fmt="ue8m0"),
            plan_bf16_to_fp8(source, like=like),
            plan_bf16_to_fp8(source, max_shard_size=10**6),
        ]
    assert len({plan.digest for plan in plans} | digests) == 8


def test_the_digest_forgets_where_and_when_it_was_copied(fp8_checkpoint: Path, tmp_path: Path) -> None:
    expected = plan_of(fp8_checkpoint)
    elsewhere = Path(shutil.copytree(fp8_checkpoint, tmp_path / "elsewhere"))
    for path in elsewhere.iterdir():
        path.chmod(0o600)  # another ctime
    found = plan_of(elsewhere)
    assert found.source_files != expected.source_files
    assert found.digest == expected.digest == plan_of(fp8_checkpoint).digest
    assert len(found.digest) == 64
