"""Which files of a directory may be opened, and which of them travel with a conversion."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Container
from fnmatch import fnmatch
from pathlib import Path

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.index import INDEX_NAME
from dsv3_tools.errors import CheckpointError

__all__ = ["WORK_FOLDER", "hub_blob_sha256", "may_travel", "read_small_file", "regular_file", "side_files"]

WORK_FOLDER = ".dsv3"

_TRAVELS = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "*.py")
_STAYS = (
    INDEX_NAME,
    CONFIG_NAME,
    "dsv3_*.json",  # what this program says of one result: manifest, figures, where it was uploaded
    # Say how the weights are quantized, which a conversion changes: wrong beside the new weights.
    "hf_quant_config.json",
    "quant_cfg.json",
    "quant_model_description.json",
    "quantize_config.json",
    # Pickle runs code when it is loaded.
    "*.pt",
    "*.pth",
    "*.bin",
    "*.pkl",
    "*.pickle",
    "*.ckpt",
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def regular_file(directory: Path, name: str) -> Path:
    """Returns the real path of `directory/name`, a regular file.

    A symbolic link may point inside the directory, or, in a Hugging Face cache, from
    `snapshots/<revision>/` to `../../blobs/`.

    Raises:
        CheckpointError: missing, not a regular file, or a link out.
    """
    path = directory / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {_reason(error)}") from None
    root = directory.resolve()
    if not real.is_relative_to(root) and real.parent != _hub_blobs(root):
        raise CheckpointError(
            f"{path}: is a link to {real}, outside the checkpoint; copy the file into place"
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is not a regular file")
    return real


def read_small_file(directory: Path, name: str, max_nbytes: int) -> bytes:
    """Returns the bytes of `directory/name`, a regular file of at most `max_nbytes`.

    Raises:
        CheckpointError: not such a file, too large, or not readable.
    """
    path = regular_file(directory, name)
    try:
        with path.open("rb") as file:
            data = file.read(max_nbytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
    if len(data) > max_nbytes:
        raise CheckpointError(f"{path}: more than {max_nbytes:,} bytes, too large for such a file")
    return data


def hub_blob_sha256(directory: Path, name: str) -> str | None:
    """Returns the SHA-256 that the Hugging Face cache records for a large file, in its blob's name."""
    real = (directory / name).resolve()
    in_cache = real.parent == _hub_blobs(directory.resolve())
    return real.name if in_cache and _SHA256.fullmatch(real.name) else None


def side_files(directory: Path, shards: Container[str]) -> tuple[list[str], list[str]]:
    """Returns the names of the files that travel unchanged, and of everything that stays behind.

    Travelling: tokenizer, chat template, generation config, licence, `*.py` (copied as bytes, never
    imported). The checkpoint's own `shards`, `config.json` and the index are written anew and in neither
    list; a safetensors file that the index does not know stays behind.
    """
    travel, stay = [], []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        name = entry.name
        if name in (CONFIG_NAME, INDEX_NAME) or name in shards:
            continue
        path = directory / name  # unlike its entry, says False of a link that leads round in a circle
        if may_travel(name) and path.is_file():
            regular_file(directory, name)
            travel.append(name)
        else:
            stay.append(name + "/" if path.is_dir() else name)
    return travel, stay


def may_travel(name: str) -> bool:
    """Whether a file of this name belongs to a result as it is."""
    wanted = any(fnmatch(name, pattern) for pattern in _TRAVELS)
    return wanted and name.isprintable() and not any(fnmatch(name.lower(), pattern) for pattern in _STAYS)


def _hub_blobs(root: Path) -> Path | None:
    return root.parent.parent / "blobs" if root.parent.name == "snapshots" else None


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
