"""A checkpoint in a directory or on the Hub: headers at once, tensors when asked for, never written to."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES, ModelConfig, parse_config
from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.files import Files, LocalFiles, ShardFile
from dsv3_tools.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES, parse_index
from dsv3_tools.checkpoint.manifest import PUSH_NAME
from dsv3_tools.checkpoint.source import Source, SourceLike, parse_source
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import CheckpointError, join_problems

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint"]

SINGLE_FILE_NAME = "model.safetensors"


class Checkpoint:
    """Safetensors shards in a directory or in a model on the Hub, opened lazily and read-only.

    Opening reads `config.json`, the index and every shard's header, and refuses files that do not agree; no
    tensor is read. A Hugging Face cache snapshot opens like any directory. Of a model on the Hub nothing else
    comes here at first: a shard is fetched whole, into the Hugging Face cache, when a tensor of it is read.

    Args:
        source: a directory, or `org/name`, `hf://org/name@revision` on the Hub.

    Attributes:
        source: the directory, or the model on the Hub with the commit that it had at first contact.
        config_json: `config.json` as it is.
        config: what this program needs of it.
        weight_map: the shard of every tensor.
        shards: every shard's header.
        specs: dtype and shape of every tensor.

    Example:
        >>> with Checkpoint("miniature/checkpoint") as checkpoint:
        ...     checkpoint.specs["lm_head.weight"]
        TensorSpec(dtype='BF16', shape=(2048, 256))

    Raises:
        CheckpointError: what is wrong with the files, all of it in one message.
        NetworkError: the Hub could not be asked.
    """

    def __init__(self, source: SourceLike) -> None:
        self._files = _open_files(parse_source(source))
        self.source: Source = self._files.source
        where = self.where(CONFIG_NAME)
        config = self.read_file(CONFIG_NAME, MAX_CONFIG_BYTES)
        self.config_json: Mapping[str, Any] = parse_config(config, where)
        self.config = ModelConfig.from_dict(self.config_json, where)
        self.has_index = self.has_file(INDEX_NAME)
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

    def where(self, name: str) -> str:
        """Returns what messages call a file."""
        return f"{self.source}/{name}"

    def has_file(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self._files.exists(name)

    def read_file(self, name: str, max_nbytes: int) -> bytes:
        """Returns a small file beside the shards.

        Raises:
            CheckpointError: no such file, larger, or not readable.
        """
        return self._files.read(name, max_nbytes)

    def folder_of(self, names: Collection[str]) -> Path:
        """Returns a directory in which those small files of `names` are that exist, for what reads files."""
        return self._files.folder_of(names)

    def side_files(self) -> tuple[list[str], list[str]]:
        """Returns which files travel with a conversion, and which stay behind; see `paths.side_files`."""
        return self._files.side_files(self.shards)

    def stated_sha256(self) -> dict[str, str]:
        """Returns the SHA-256 of large files that the Hub states, by name; empty for a directory."""
        return self._files.stated_sha256()

    def is_kept(self, shard: str) -> bool:
        """Whether a shard is on a disk of this machine and will stay there."""
        return self._files.is_kept(shard)

    def fetch(self, shard: str, folder: Path | None, check: Callable[[], None]) -> None:
        """Brings a shard here if it is not: into `folder`, or into the Hugging Face cache, to stay.

        Raises:
            NetworkError: it could not be had.
            DestinationError: it could not be written.
            Interrupted: by `check`, which is called every now and then.
        """
        self._files.fetch(shard, folder, check)

    def discard(self, shard: str) -> None:
        """Removes a shard that was fetched into a folder; leaves any other."""
        with self._lock:
            descriptor = self._descriptors.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)
        self._files.discard(shard)

    def path(self, shard: str) -> Path:
        """Returns where a shard is on disk, fetched first if it is not here."""
        return self._files.path(shard)

    def check_unchanged(self, shard: str) -> None:
        """Refuses a shard that was written to since it was opened or fetched.

        Raises:
            CheckpointError: time or size differ.
        """
        status = os.fstat(self.descriptor(shard))
        if (status.st_mtime_ns, status.st_size) != self._files.stamp(shard):
            raise CheckpointError(
                f"{self.where(shard)}: was written to during the run; run the same command again"
            )

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
                raise CheckpointError(f"{self.where(shard)}: {what}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.where(shard)}: {what}: the file ended at byte {position + done:,}; "
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

    def read_alone(self, name: str) -> bytes:
        """Returns a small tensor's bytes; a shard on the Hub is not fetched for its sake."""
        shard, offset = self.location(name)
        return self._files.read_range(shard, offset, self.specs[name].nbytes)

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
            if shard in self._descriptors:
                return self._descriptors[shard]
        path = self.path(shard)  # which may have to be fetched first
        with self._lock:
            if shard not in self._descriptors:
                try:
                    self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path}: {error.strerror}") from error
            return self._descriptors[shard]

    def _read_weight_map(self) -> dict[str, str]:
        return parse_index(self.read_file(INDEX_NAME, MAX_INDEX_BYTES), self.where(INDEX_NAME))

    def _read_headers(self) -> dict[str, ShardFile]:
        names = sorted(set(self.weight_map.values())) or [SINGLE_FILE_NAME]
        if not self.has_index and not self.has_file(SINGLE_FILE_NAME):
            if self.has_file(PUSH_NAME):
                raise CheckpointError(
                    f"{self.source}: its shards went to the Hub and were removed; {PUSH_NAME} says where to"
                )
            raise CheckpointError(
                f"{self.source}: neither {INDEX_NAME} nor {SINGLE_FILE_NAME} is there; "
                "an interrupted download or conversion has no index"
            )
        pool = ThreadPoolExecutor(8)
        try:
            outcomes = list(pool.map(partial(_try_header, self._files), names))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for a slow network
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
            f"{name!r} is not in the index (left from another checkpoint?)"
            for name in self._files.names()
            if fnmatch(name, "model*.safetensors") and name not in listed
        ]
        if problems:
            raise CheckpointError(f"{self.source}: {join_problems(problems)}")


def _try_header(files: Files, name: str) -> ShardFile | CheckpointError:
    try:
        return files.header(name)
    except CheckpointError as error:
        return error


def _open_files(source: Source) -> Files:
    if isinstance(source, Path):
        return LocalFiles(source)
    # Imported here: huggingface_hub takes half a second, which a directory does not need.
    from dsv3_tools.checkpoint.hub import open_hub

    return open_hub(source)
