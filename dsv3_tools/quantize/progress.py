"""What a calibrated run keeps in its working folder: hidden states every few layers, figures of every layer.

Shape suffixes: B sequences, L tokens of a sequence, D hidden.
"""
# ruff: noqa: N803 (shape suffixes are capitals)

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.durable import write_file
from dsv3_tools.checkpoint.files import read_shard_header
from dsv3_tools.checkpoint.header import encode_header
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.checkpoint.writer import ShardWriter
from dsv3_tools.conversion.buffers import as_bytes
from dsv3_tools.errors import CheckpointError
from dsv3_tools.quantize.figures import LayerFigures

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load_figures", "load_states", "save_figures", "save_states", "saved_layers"]

_NAME = "hidden"
_CHUNK_NBYTES = 64 << 20


def save_states(folder: Path, number: int, values_BLD: Tensor) -> None:
    """Writes the hidden states before layer `number`, durably, then removes those saved earlier."""
    from dsv3_tools.model.numerics import COMPUTE_DTYPES, compute_dtype

    name = next(name for name in COMPUTE_DTYPES if compute_dtype(name) == values_BLD.dtype)
    spec = TensorSpec(name, tuple(values_BLD.shape))
    encoded, header = encode_header({_NAME: spec})
    path = _states_path(folder, number)
    with ShardWriter(
        path, folder=folder, label="states", header=encoded, nbytes=header.file_nbytes
    ) as writer:
        offset = header.offsets[_NAME]
        rows = max(1, _CHUNK_NBYTES // max(1, spec.nbytes // max(1, len(values_BLD))))
        for start in range(0, len(values_BLD), rows):
            part = values_BLD[start : start + rows].contiguous().cpu()
            writer.write(offset, as_bytes(part))
            offset += part.numel() * part.element_size()
        sha256 = writer.commit()
    write_file(_digest_path(folder, number), sha256.encode(), folder=folder)
    for other in saved_layers(folder):
        if other != number:
            _digest_path(folder, other).unlink(missing_ok=True)
            _states_path(folder, other).unlink(missing_ok=True)


def saved_layers(folder: Path) -> list[int]:
    """Returns the layers before which hidden states are saved, the last one first."""
    names = (path.name for path in folder.glob("states-*.sha256"))  # written after the states
    return sorted((int(name.split("-")[1].split(".")[0]) for name in names), reverse=True)


def load_states(folder: Path, number: int, values_BLD: Tensor) -> None:
    """Reads saved hidden states into `values_BLD`.

    Raises:
        CheckpointError: they are not those of this run.
    """
    import torch

    path = _states_path(folder, number)
    header = read_shard_header(folder, path.name).header
    spec = header.specs.get(_NAME)
    if spec is None or spec.shape != tuple(values_BLD.shape) or torch_dtype(spec.dtype) != values_BLD.dtype:
        raise CheckpointError(f"{path}: holds {spec}, expected hidden states of this run; remove the file")
    row_nbytes = spec.nbytes // max(1, len(values_BLD))
    rows = max(1, _CHUNK_NBYTES // max(1, row_nbytes))
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(header.offsets[_NAME]))
        for start in range(0, len(values_BLD), rows):
            part = values_BLD[start : start + rows]
            data = bytearray(file.read(len(part) * row_nbytes))
            digest.update(data)
            part.copy_(torch.frombuffer(data, dtype=torch.uint8).view(values_BLD.dtype).view(part.shape))
    if digest.hexdigest() != _digest_path(folder, number).read_text():
        raise CheckpointError(
            f"{path}: does not have the SHA-256 that it was saved with; remove the .sha256 beside it "
            "to begin again"
        )


def save_figures(folder: Path, figures: LayerFigures) -> None:
    """Writes what is known of a layer, durably."""
    write_file(_figures_path(folder, figures.number), json.dumps(asdict(figures)).encode(), folder=folder)


def load_figures(folder: Path, numbers: Collection[int]) -> dict[int, LayerFigures]:
    """Returns the figures of those layers that have some."""
    found = {}
    for number in numbers:
        path = _figures_path(folder, number)
        if path.exists():
            found[number] = LayerFigures.from_json(json.loads(path.read_bytes()))
    return found


def _states_path(folder: Path, number: int) -> Path:
    return folder / f"states-{number}.safetensors"


def _digest_path(folder: Path, number: int) -> Path:
    return folder / f"states-{number}.sha256"


def _figures_path(folder: Path, number: int) -> Path:
    return folder / f"layer-{number}.json"
