"""`model.safetensors.index.json`: which shard holds which tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dsv3_tools.checkpoint.header import check_tensor_name, load_json
from dsv3_tools.errors import CheckpointError, HeaderError

__all__ = [
    "INDEX_NAME",
    "MAX_INDEX_BYTES",
    "encode_index",
    "is_shard_name",
    "parse_index",
    "parse_metadata",
    "shard_name",
]

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


def shard_name(number: int, total: int) -> str:
    """Returns the released naming: `model-00001-of-000163.safetensors`; `number` counts from 1."""
    return f"model-{number:05d}-of-{total:06d}.safetensors"


def is_shard_name(name: str) -> bool:
    """Whether `name` is a plain file name that a shard may have: no folder, no hidden file."""
    return _SHARD_NAME.fullmatch(name) is not None and ".." not in name


def parse_index(text: bytes, where: str) -> dict[str, str]:
    """Returns the weight map, tensor name to shard name.

    `metadata` is not read: the released `total_size` is not the size on disk.

    Raises:
        CheckpointError: not an index, a name that no tensor has, or a shard that is not a plain file name.
    """
    try:
        document = load_json(text, where)
    except HeaderError as error:
        raise CheckpointError(str(error)) from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: no weight_map with at least one tensor")
    for name, shard in weight_map.items():
        check_tensor_name(name, where)
        if not isinstance(shard, str) or not is_shard_name(shard):
            raise CheckpointError(
                f"{where}: tensor {name[:100]!r} is said to be in {str(shard)[:100]!r}, "
                "expected a .safetensors file name without folders"
            )
    return weight_map


def parse_metadata(text: bytes, where: str) -> dict[str, Any] | None:
    """Returns an index's "metadata", whatever it says; None if it has none.

    Raises:
        CheckpointError: not JSON.
    """
    try:
        document = load_json(text, where)
    except HeaderError as error:
        raise CheckpointError(str(error)) from None
    metadata = document.get("metadata") if isinstance(document, dict) else None
    return metadata if isinstance(metadata, dict) else None


def encode_index(
    weight_map: Mapping[str, str],
    *,
    total_size: int,
    total_parameters: int,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Returns the index file: exact `total_size` in bytes of tensors, names sorted as transformers does.

    `metadata` is another index's that is made again: its keys and no others, with the true `total_size`.
    """
    counts = {"total_parameters": total_parameters, "total_size": total_size}
    document = {
        "metadata": counts if metadata is None else {**metadata, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
