"""Which bytes are read in one go, and where they land; the copies themselves are tested on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsv3_tools import Checkpoint
from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import CheckpointError
from dsv3_tools.model import staging
from dsv3_tools.model.staging import CpuReader, Piece, lay_out


@pytest.fixture(scope="module")
def checkpoint(miniature: Path):
    with Checkpoint(miniature) as opened:
        yield opened


def expert(number: int) -> list[str]:
    parts = ("gate_proj", "up_proj", "down_proj")
    return [
        f"model.layers.1.mlp.experts.{number}.{part}.{suffix}"
        for part in parts
        for suffix in ("weight", "weight_scale_inv")
    ]


def fill(checkpoint: Checkpoint, pieces: list[Piece], window: int) -> tuple[list[bytes], int]:
    """Does what `CudaReader` does, in host memory; returns the pieces' bytes and how many reads it took."""
    runs, places = lay_out(pieces)
    nbytes = runs[-1].place + runs[-1].nbytes
    memory, num_reads = np.full(nbytes, 0xAA, np.uint8), 0
    for begin in range(0, nbytes, window):
        end = min(begin + window, nbytes)
        for run, skipped, place, count in staging._within(runs, begin, end):
            buffer = memory[place : place + count].data
            checkpoint.read_file_into(run.shard, run.position + skipped, buffer, what=run.name)
            num_reads += 1
    return [bytes(memory[at : at + p.spec.nbytes]) for at, p in zip(places, pieces, strict=True)], num_reads


def stored(checkpoint: Checkpoint, piece: Piece) -> bytes:
    return bytes(checkpoint.read_bytes(piece.name)[piece.start : piece.start + piece.spec.nbytes])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_piece_lands_whole_and_aligned(checkpoint: Checkpoint, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(checkpoint.specs)), min_size=1, max_size=12))
    pieces = []
    for name in names:
        spec = checkpoint.specs[name]
        rows = data.draw(st.integers(0, spec.shape[0] - 1))
        height = data.draw(st.integers(1, spec.shape[0] - rows))
        row_nbytes = spec.nbytes // spec.shape[0]
        pieces.append(
            Piece(checkpoint, name, rows * row_nbytes, TensorSpec(spec.dtype, (height, *spec.shape[1:])))
        )
    window = data.draw(st.sampled_from([512, 4096, 1 << 16, 1 << 24]))
    found, _ = fill(checkpoint, pieces, window)
    assert found == [stored(checkpoint, piece) for piece in pieces]
    _, places = lay_out(pieces)
    assert all(8 * at % DTYPES[p.spec.dtype].bits == 0 for at, p in zip(places, pieces, strict=True))


def test_an_expert_takes_two_reads(checkpoint: Checkpoint) -> None:
    """Its weights are neighbours in a file, and so are its scales."""
    pieces = [Piece(checkpoint, name, 0, checkpoint.specs[name]) for name in expert(3)]
    assert len({checkpoint.weight_map[piece.name] for piece in pieces}) == 1
    _, num_reads = fill(checkpoint, pieces, 1 << 24)
    assert num_reads == 2
    runs, _ = lay_out(pieces)
    assert sorted(run.nbytes for run in runs) == sorted(
        sum(p.spec.nbytes for p in pieces if p.name.endswith(suffix)) for suffix in ("weight", "scale_inv")
    )


def test_a_neighbour_that_would_be_misaligned_begins_a_run(tmp_path: Path, checkpoint: Checkpoint) -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(3, dtype=torch.uint8), "c": torch.ones(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint.source / "config.json").read_text())
    with Checkpoint(tmp_path) as small:
        neighbours = [Piece(small, "c", 0, small.specs["c"]), Piece(small, "b", 0, small.specs["b"])]
        assert len(lay_out(neighbours)[0]) == 1
        halves = [Piece(small, "a", 0, TensorSpec("U8", (3,))), Piece(small, "a", 3, TensorSpec("F32", (2,)))]
        runs, places = lay_out(halves)
        assert len(runs) == 2
        assert places == [0, 256]


def test_a_shortened_file_is_named(tmp_path: Path, checkpoint: Checkpoint) -> None:
    save_file({"a": torch.ones(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint.source / "config.json").read_text())
    with Checkpoint(tmp_path) as small:
        piece = Piece(small, "a", 0, small.specs["a"])
        assert bytes(CpuReader().read([piece]).tensors[0].numpy().data) == stored(small, piece)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(200)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: a: the file ended"):
            CpuReader().read([piece])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: a: the file ended"):
            fill(small, [piece], 1 << 20)
