"""Calibration data: tokens from a file of ids or text, in sequences of one length, and which are held out.

Shape suffixes: B sequences, L tokens of a sequence.
"""
# ruff: noqa: N806, N815 (shape suffixes are capitals)

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.errors import UsageError
from dsv3_tools.model.tokenizer import TOKENIZER_FILES
from dsv3_tools.model.tokens import read_tokens

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".txt", ".jsonl", ".npy", ".safetensors")
"""Kinds of files: text, and ids."""

HELD_OUT = 10
"""Every so manyth sequence stays out of all Hessians, to measure errors on; with fewer, the last one."""

__all__ = ["HELD_OUT", "LENGTHS", "Calibration", "read_calibration"]

LENGTHS = (2048, 1024, 512, 256, 128)
"""Tokens of a sequence that is cut from a text: the first of which there are ten, or the last."""


@dataclass(frozen=True)
class Calibration:
    """Sequences of one length, those for Hessians first.

    Attributes:
        tokens_BL: int64 ids.
        num_train: sequences that Hessians are of; those after them are held out.
        source: for people: "text.txt, 512 x 2048".
        sha256: of the ids (int64) in the order of the file.
    """

    tokens_BL: Tensor
    num_train: int
    source: str
    sha256: str

    def record(self) -> Mapping[str, Any]:
        """Returns what goes into plan and manifest: sizes, and a digest of the ids."""
        count, length = self.tokens_BL.shape
        held_out = count - self.num_train
        return {"sequences": count, "length": length, "held_out": held_out, "sha256": self.sha256}


def read_calibration(
    checkpoint: Checkpoint,
    file: Path | None,
    *,
    length: int | None,
    max_tokens: int | None,
) -> Calibration:
    """Returns calibration data.

    Args:
        checkpoint: whose tokenizer makes ids of text.
        file: `.txt` (UTF-8), `.jsonl` (objects with "text", "messages" or "input_ids"), `.npy` or
            `.safetensors` (ids, in one or two dimensions); None is the text that comes along.
        length: tokens of a sequence; None goes by `LENGTHS` for what is cut from a stream.
        max_tokens: of all sequences together.

    Raises:
        CheckpointError: a file cannot be used, or has ids that the model does not.
        UsageError: options that make no sense.
    """
    import torch

    if file is not None and file.suffix not in SUFFIXES:
        raise UsageError(f"{file}: got a {file.suffix or 'nameless'} file, expected {', '.join(SUFFIXES)}")
    is_ids = file is not None and file.suffix in SUFFIXES[2:]
    given = read_tokens(
        checkpoint.folder_of(TOKENIZER_FILES),
        tokens=file if is_ids else None,
        text=None if is_ids else file,
        length=length,
        max_tokens=max_tokens,
        vocab_size=checkpoint.config.vocab_size,
        lengths=LENGTHS,
    )
    count = len(given.batch_BL)
    if count < 2:
        raise UsageError(
            f"{given.source}: got {count} sequence, expected at least 2, for one is held out; give "
            "more text, or a smaller --length"
        )
    numbers = torch.arange(count)
    is_held = (numbers + 1) % HELD_OUT == 0 if count >= HELD_OUT else numbers == count - 1
    ordered_BL = torch.cat([given.batch_BL[~is_held], given.batch_BL[is_held]])
    digest = hashlib.sha256(given.batch_BL.contiguous().numpy().tobytes()).hexdigest()
    return Calibration(ordered_BL, int((~is_held).sum()), given.source, digest)
