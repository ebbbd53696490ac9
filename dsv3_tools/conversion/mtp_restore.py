"""Where the tensors of a checkpoint were before it was split, by the manifests of the two halves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_tools.checkpoint.config import parse_config
from dsv3_tools.checkpoint.index import is_shard_name
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.plan import SOURCE
from dsv3_tools.errors import CheckpointError

__all__ = ["Restoration", "find_restoration"]


@dataclass(frozen=True)
class Restoration:
    """The source's shards.

    Attributes:
        main: the source shard of every shard of the model.
        mtp: that of every shard of the module.
        tensors: that of tensors that the module was split without, by their names in the source.
        index_metadata: that of the source's index.
        config_text: the source's `config.json`.
    """

    main: Mapping[str, str]
    mtp: Mapping[str, str]
    tensors: Mapping[str, str]
    index_metadata: Mapping[str, Any] | None
    config_text: bytes

    @property
    def config(self) -> dict[str, Any]:
        """The source's `config.json`, parsed."""
        return parse_config(self.config_text)

    def shard_of(self, origin: str, shard: str, left_out: str | None) -> str:
        """Returns where the tensors of one half's `shard` were, or the tensor `left_out` was."""
        if left_out is not None:
            return self.tensors[left_out]
        return (self.main if origin == SOURCE else self.mtp)[shard]


def find_restoration(main: Checkpoint, mtp: Checkpoint) -> Restoration | None:
    """Returns where everything was, if both are what one checkpoint was split into, and None otherwise."""
    ours, theirs = _manifest(main), _manifest(mtp)
    if ours is None or theirs is None:
        return None
    try:
        first, second = ours["restoring"], theirs["restoring"]
        found = Restoration(
            first["shards"],
            second["shards"],
            second["tensors"],
            second["index_metadata"],
            second["config"].encode(),
        )
        known = _shards(ours), _shards(theirs)
        shards = {*found.main.values(), *found.mtp.values(), *found.tensors.values()}
        complete = found.main.keys() == main.shards.keys() and found.mtp.keys() == mtp.shards.keys()
        if known[0] != known[1] or not complete or not shards <= {name for name, *_ in known[0]}:
            return None
        return found if all(map(is_shard_name, shards)) else None
    except (KeyError, TypeError, AttributeError):
        return None


def _manifest(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Returns the manifest, if it is there and its own."""
    try:
        text = checkpoint.read_file(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        return parse_manifest(text, MANIFEST_NAME)
    except CheckpointError:
        return None


def _shards(manifest: Mapping[str, Any]) -> set[tuple[str, int, str]]:
    """Returns name, size and header of every shard that a split read."""
    return {
        (file["name"], file["nbytes"], file["sha256"])
        for file in manifest["sources"]
        if file["origin"] == SOURCE and file["name"].endswith(".safetensors")
    }
