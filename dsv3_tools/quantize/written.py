"""Parts of weights in shards that an earlier run has finished, in a destination that is no checkpoint yet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.files import read_shard_header
from dsv3_tools.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WrittenParts"]


class WrittenParts:
    """Open shards; what opens them keeps them although somebody removes their names.

    Args:
        folder: of the shards.
        shards: their names.
        opened: closes them.

    Raises:
        FileNotFoundError: one is not there.
    """

    def __init__(self, folder: Path, shards: Sequence[str], opened: ExitStack) -> None:
        self._folder = folder
        self._files = {name: opened.enter_context((folder / name).open("rb")) for name in shards}
        try:
            self._headers = {name: read_shard_header(folder, name).header for name in shards}
        except CheckpointError as error:
            if all((folder / name).exists() for name in shards):
                raise
            raise FileNotFoundError(str(error)) from None
        self._homes = {tensor: name for name, header in self._headers.items() for tensor in header.specs}

    def read(self, name: str, out: Tensor) -> None:
        """Fills `out`, on any device, with a tensor's bytes.

        Raises:
            CheckpointError: the shard ends early.
        """
        import torch

        shard = self._homes[name]
        nbytes = out.numel() * out.element_size()
        self._files[shard].seek(self._headers[shard].offsets[name])
        data = self._files[shard].read(nbytes)
        if len(data) != nbytes:
            raise CheckpointError(
                f"{self._folder / shard}: {name}: the file ended early; run the command again"
            )
        out.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(out.dtype).view(out.shape))
