"""Whether a comparison is on the very tokens that one of the checkpoints was calibrated with.

Shape suffixes: B sequences, L tokens of a sequence.
"""
# ruff: noqa: N803 (shape suffixes are capitals)

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.header import load_json
from dsv3_tools.checkpoint.manifest import MAX_QUANTIZATION_BYTES, QUANTIZATION_NAME
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.errors import Dsv3Error

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["calibration_sha256", "seen_before"]


def calibration_sha256(checkpoint: Checkpoint) -> str | None:
    """Returns the hash of the tokens that a checkpoint was calibrated with; None without any."""
    if not checkpoint.has_file(QUANTIZATION_NAME):
        return None
    try:
        document = load_json(
            checkpoint.read_file(QUANTIZATION_NAME, MAX_QUANTIZATION_BYTES), QUANTIZATION_NAME
        )
        return str(document["calibration"]["sha256"])
    except (Dsv3Error, KeyError, TypeError):
        return None


def seen_before(tokens_BL: Tensor, calibration: Collection[str | None]) -> Iterator[str]:
    """Yields a note if the tokens are those with one of these hashes."""
    if hashlib.sha256(tokens_BL.contiguous().numpy().tobytes()).hexdigest() in calibration:
        yield (
            "these are the tokens that the checkpoint was calibrated with: on any others it is further off; "
            "give some with --tokens or --text"
        )
