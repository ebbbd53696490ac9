"""A checkpoint on disk: headers at once, tensors when asked for, never written to."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES, ModelConfig, parse_config
from dsv3_tools.checkpoint.deepseek_infer import holds_ranks
from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.header import MAX_HEADER_BYTES, Header, parse_header
from dsv3_tools.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES, parse_index
from dsv3_tools.checkpoint.paths import WORK_FOLDER, read_small_file, regular_file
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import CheckpointError, HeaderError, join_problems

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "ShardFile", "read_shard_header"]

SINGLE_FILE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard of a checkpoint: its header, and what tells whether the file has changed since."""

    name: str
    path: Path
    header: Header
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    header_sha256: str


class Checkpoint:
    """A directory of safetensors shards, opened lazily and read-only.

    Opening reads `config.json`, the index and every shard's header, and refuses a directory whose
    files do not agree; no tensor is read. A Hugging Face cache snapshot opens like any directory.

    Example:
        >>> with Checkpoint("miniature/checkpoint") as checkpoint:
        ...     checkpoint.specs["lm_head.weight"]
        TensorSpec(dtype='BF16', shape=(2048, 256))

    Raises:
        CheckpointError: what is wrong with the directory, all of it in one message.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        _check_directory(self.directory)
        self.config_json: Mapping[str, Any] = parse_config(
            read_small_file(self.directory, CONFIG_NAME, MAX_CONFIG_BYTES), str(self.directory / CONFIG_NAME)
        )
        self.config = ModelConfig.from_dict(self.config_json, str(self.directory / CONFIG_NAME))
        self.has_index = os.path.lexists(self.directory / INDEX_NAME)
        self.weight_map: Mapping[str, str] = self._read_weight_map() if self.has_index else {}
        self.shards: Mapping[str, ShardFile] = self._read_headers()
        if not self.has_index:
            self.weight_map = dict.fromkeys(self.shards[SINGLE_FILE_NAME].header.specs, SINGLE_FILE_NAME)
        self._check_agreement()
        self.specs: Mapping[str, TensorSpec] = {
            name: spec for shard in self.shards.values() for name, spec in shard.header.specs.items()
        }
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards' descriptors; reading opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(spec.nbytes for spec in self.specs.values())

    def location(self, name: str) -> tuple[str, int]:
        """Returns the shard of a tensor and the offset of its first byte in that file."""
        shard = self.weight_map[name]
        return shard, self.shards[shard].header.offsets[name]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from byte `start` on.

        Raises:
            CheckpointError: the file ended early or could not be read.
        """
        shard, offset = self.location(name)
        self.read_file_into(shard, offset + start, buffer, what=name)

    def read_file_into(self, shard: str, position: int, buffer: memoryview, *, what: str) -> None:
        """Fills `buffer` with the bytes of a shard from byte `position` on; `what` they are, for errors.

        Raises:
            CheckpointError: the file ended early or could not be read.
        """
        descriptor, done = self.descriptor(shard), 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{self.shards[shard].path}: {what}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.shards[shard].path}: {what}: the file ended at byte {position + done:,}; "
                    "it was shortened after it was opened"
                )
            done += count

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        """Asks the system to read these bytes of a tensor ahead, in the background."""
        shard, offset = self.location(name)
        os.posix_fadvise(self.descriptor(shard), offset + start, nbytes, os.POSIX_FADV_WILLNEED)

    def read_bytes(self, name: str) -> bytearray:
        """Returns a tensor's bytes, whole."""
        data = bytearray(self.specs[name].nbytes)
        self.read_into(name, 0, memoryview(data))
        return data

    def read(self, name: str, *, device: str | torch.device = "cpu") -> torch.Tensor:
        """Returns a tensor, whole, on `device`."""
        import torch

        spec = self.specs[name]
        flat = torch.empty(spec.nbytes, dtype=torch.uint8)
        self.read_into(name, 0, flat.numpy().data)
        return flat.view(torch_dtype(spec.dtype)).reshape(spec.shape).to(device)

    def descriptor(self, shard: str) -> int:
        """Returns an open read-only descriptor of a shard; the checkpoint closes it."""
        with self._lock:
            if shard not in self._descriptors:
                path = self.shards[shard].path
                try:
                    self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path}: {error.strerror}") from error
            return self._descriptors[shard]

    def _read_weight_map(self) -> dict[str, str]:
        text = read_small_file(self.directory, INDEX_NAME, MAX_INDEX_BYTES)
        return parse_index(text, str(self.directory / INDEX_NAME))

    def _read_headers(self) -> dict[str, ShardFile]:
        names = sorted(set(self.weight_map.values())) or [SINGLE_FILE_NAME]
        if not self.has_index and not (self.directory / SINGLE_FILE_NAME).exists():
            raise CheckpointError(
                f"{self.directory}: neither {INDEX_NAME} nor {SINGLE_FILE_NAME} is there; "
                "an interrupted download or conversion has no index"
            )
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(lambda name: _try_header(self.directory, name), names))
        problems = [str(outcome) for outcome in outcomes if isinstance(outcome, CheckpointError)]
        if problems:
            raise CheckpointError(join_problems(problems))
        return {shard.name: shard for shard in outcomes if isinstance(shard, ShardFile)}

    def _check_agreement(self) -> None:
        """Refuses a tensor that the index and the headers do not place in the same, single shard."""
        problems = []
        holder: dict[str, str] = {}
        for shard in self.shards.values():
            for name in shard.header.specs:
                if name in holder:
                    problems.append(f"tensor {name} is in {holder[name]} and in {shard.name}")
                holder[name] = shard.name
                if self.weight_map.get(name, shard.name) != shard.name:
                    problems.append(
                        f"tensor {name} is in {shard.name}, the index says {self.weight_map[name]}"
                    )
                elif name not in self.weight_map:
                    problems.append(f"tensor {name} is in {shard.name} but not in the index")
        problems += [
            f"tensor {name} is not in {shard}, where the index has it"
            for name, shard in self.weight_map.items()
            if name not in holder
        ]
        listed = set(self.shards)
        problems += [
            f"{path.name!r} is not in the index (left from another checkpoint?)"
            for path in sorted(self.directory.glob("model*.safetensors"))
            if path.name not in listed
        ]
        if problems:
            raise CheckpointError(f"{self.directory}: {join_problems(problems)}")


def read_shard_header(directory: Path, name: str) -> ShardFile:
    """Opens one shard and returns its header.

    Raises:
        CheckpointError: not a regular file that may be read.
        HeaderError: not a safetensors file.
    """
    path = regular_file(directory, name)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, status.st_size - 8):
                raise HeaderError(
                    f"{path}: not a safetensors file of {status.st_size:,} bytes: its header claims "
                    f"{length:,} bytes, expected 2 to {MAX_HEADER_BYTES:,} (truncated or garbage)"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    header = parse_header(text, status.st_size, str(path))
    digest = hashlib.sha256(start + text).hexdigest()
    return ShardFile(name, path, header, status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest)


def _try_header(directory: Path, name: str) -> ShardFile | CheckpointError:
    try:
        return read_shard_header(directory, name)
    except CheckpointError as error:
        return error


def _check_directory(directory: Path) -> None:
    try:
        is_directory, exists = directory.is_dir(), directory.exists()
    except OSError as error:
        raise CheckpointError(f"{str(directory)[:200]}: {error.strerror}") from None
    if not is_directory:
        kind = "is a file" if exists else "does not exist"
        raise CheckpointError(f"{directory}: {kind}, expected a directory with a checkpoint")
    if (directory / WORK_FOLDER).exists():
        raise CheckpointError(
            f"{directory}: has a {WORK_FOLDER} folder, so a conversion into it has not finished; "
            "run that command again first"
        )
    if holds_ranks(directory):
        raise CheckpointError(
            f"{directory}: holds one shard for each rank of DeepSeek's inference demo, which nothing else "
            "reads; expected a Hugging Face checkpoint, such as the one that it was made from"
        )
