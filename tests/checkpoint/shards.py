"""Small shards and their pieces, for the tests of what writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from dsv3_tools.checkpoint.header import encode_header
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.checkpoint.writer import ShardWriter

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def make_tensors(seed: int, specs: dict[str, TensorSpec]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in specs.items():
        high = 2 if spec.dtype == "BOOL" else 256
        data = torch.randint(0, high, (spec.nbytes,), dtype=torch.uint8, generator=generator)
        tensors[name] = data.view(DTYPES[spec.dtype]).reshape(spec.shape)
    return tensors


def pieces(
    specs: dict[str, TensorSpec], tensors: dict[str, torch.Tensor], chunk: int
) -> list[tuple[int, bytes]]:
    """Returns every byte of the tensors as (offset in the file, at most `chunk` bytes)."""
    _, header = encode_header(specs)
    result = []
    for name, tensor in tensors.items():
        data = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
        offset = header.offsets[name]
        result += [(offset + at, data[at : at + chunk]) for at in range(0, len(data), chunk)]
    return result


def open_writer(folder: Path, specs: dict[str, TensorSpec]) -> ShardWriter:
    text, header = encode_header(specs)
    final = folder / "model-00001-of-000001.safetensors"
    return ShardWriter(final, folder=folder, label="plan", header=text, nbytes=header.file_nbytes)


SPECS = {"b": TensorSpec("F32", (5, 3)), "a": TensorSpec("BF16", (7,)), "c": TensorSpec("F8_E4M3", (3, 11))}
TENSORS = make_tensors(0, SPECS)
PIECES = sorted(pieces(SPECS, TENSORS, 16))
NBYTES = encode_header(SPECS)[1].file_nbytes


def fill(shard: ShardWriter) -> None:
    for offset, data in PIECES:
        shard.write(offset, memoryview(data))


def expected_bytes(folder: Path) -> bytes:
    folder.mkdir()
    save_file(TENSORS, folder / "x", metadata={"format": "pt"})
    return (folder / "x").read_bytes()
