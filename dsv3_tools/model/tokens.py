"""The tokens that a model is run on: from a file of ids, from a text, or from the text that comes along.

All sequences of a batch have one length; there is no padding. A stream (a text, or ids in one dimension) is
cut into sequences, and a last, shorter one is dropped unless it is the only one.

Shape suffixes: B sequences, L tokens of a sequence, T tokens of a stream.
"""
# ruff: noqa: N803, N806, N815 (shape suffixes are capitals)

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from dsv3_tools.checkpoint.paths import read_small_file
from dsv3_tools.errors import CheckpointError, Dsv3Error, UsageError
from dsv3_tools.model.documents import read_documents
from dsv3_tools.model.token_files import read_token_file
from dsv3_tools.model.tokenizer import TOKENIZER_NAME, Tokenizer, read_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Ids = npt.NDArray[np.integer[Any]]

__all__ = ["DEFAULT_LENGTH", "Tokens", "cut", "limit", "read_tokens"]

DEFAULT_LENGTH = 512
"""Tokens of a sequence that is cut from a stream, if the model has as many positions."""

_MAX_TEXT_BYTES = 100_000_000
_ENOUGH = 10
_BUILT_IN = "text.txt"


@dataclass(frozen=True)
class Tokens:
    """Sequences of one length.

    Attributes:
        batch_BL: token ids, int64; every one is in the vocabulary.
        source: for people: "tokens.npy, 4 x 512", "built-in text, 6 x 512".
        tokenizer: gives their text; None if the checkpoint has none that can be read here. Text needs one.
    """

    batch_BL: Tensor
    source: str
    tokenizer: Tokenizer | None


def read_tokens(
    directory: Path,
    *,
    tokens: Path | None,
    text: Path | None,
    length: int | None,
    max_tokens: int | None,
    vocab_size: int,
    lengths: Sequence[int] = (DEFAULT_LENGTH,),
) -> Tokens:
    """Returns tokens from one of `tokens` and `text`, or, without both, from the built-in text.

    Args:
        directory: of the checkpoint: `config.json`, and for text its tokenizer.
        tokens: a `.npy` or `.safetensors` file of ids, see `read_token_file`; no BOS is added to them.
        text: UTF-8, or `.jsonl`, see `documents`; each sequence begins with BOS if the tokenizer has it so.
        length: tokens of a sequence at most, BOS included; None is `DEFAULT_LENGTH` for a stream, whole rows
            otherwise.
        max_tokens: of all sequences together; None is all that there are.
        vocab_size: the model's.
        lengths: of sequences cut from a stream, if `length` is None: the first that gives ten of them, or the
            last.

    Raises:
        CheckpointError: a file cannot be used, or has ids that the model does not.
        UsageError: options that make no sense, or text without the library `tokenizers`.
    """
    _check_options(tokens, text, length, max_tokens)
    positions = _max_positions(directory)
    _check_length(length or 0, positions, "--length")
    choices = [length] if length else [min(one, positions) for one in lengths]
    tokenizer: Tokenizer | None
    if tokens is not None:
        name, where = tokens.name, tokens
        tokenizer = _tokenizer_if_any(directory)
        ids = read_token_file(tokens)
        rows_BL = ids[:, :length] if ids.ndim == 2 else cut(ids, _choose_length(ids, choices, max_tokens))
    else:
        name = "built-in text" if text is None else text.name
        where = directory / TOKENIZER_NAME
        if text is not None and text.suffix == ".jsonl":
            where, tokenizer = text, _tokenizer_if_any(directory)
            ids = _as_array(read_documents(_read_text(text), text, directory))
        else:
            tokenizer = read_tokenizer(directory)
            ids = _as_array(tokenizer.encode(_read_text(text)))
        if not ids.size:
            raise CheckpointError(f"{text}: there is no text in it")
        bos_id = None if tokenizer is None else tokenizer.bos_id
        rows_BL = cut(ids, _choose_length(ids, choices, max_tokens), bos_id=bos_id)
    _check_size(rows_BL, name)
    rows_BL = limit(rows_BL, max_tokens)
    _check_length(rows_BL.shape[1], positions, f"{name}: rows of")
    _check_ids(rows_BL, vocab_size, where)
    return Tokens(_as_tensor(rows_BL), "{}, {} x {}".format(name, *rows_BL.shape), tokenizer)


def cut(ids_T: Ids, length: int, *, bos_id: int | None = None) -> Ids:
    """Returns a stream as sequences of `length` tokens, of which the first is `bos_id` if there is one.

    A last, shorter sequence is dropped, unless it is the only one.
    """
    import numpy as np

    taken = length if bos_id is None else length - 1
    num_sequences = max(1, len(ids_T) // taken)
    rows_BL = ids_T[: num_sequences * taken].reshape(num_sequences, -1)
    if bos_id is None:
        return rows_BL
    return np.hstack([np.full((num_sequences, 1), bos_id, rows_BL.dtype), rows_BL])


def limit(rows_BL: Ids, max_tokens: int | None) -> Ids:
    """Returns as many whole sequences as `max_tokens` allows, or as much of the first; None is all."""
    if max_tokens is None:
        return rows_BL
    return rows_BL[: max(1, max_tokens // rows_BL.shape[1]), :max_tokens]


def _check_options(
    tokens: Path | None, text: Path | None, length: int | None, max_tokens: int | None
) -> None:
    if tokens is not None and text is not None:
        raise UsageError(f"--tokens {tokens} and --text {text}: got both, expected one of them")
    for option, value in (("--length", length), ("--max-tokens", max_tokens)):
        if value is not None and value < 2:
            raise UsageError(
                f"{option}: got {value}, expected at least 2: every token but the last predicts one"
            )


def _max_positions(directory: Path) -> int:
    """Returns how long a sequence may be; without a bound in `config.json` there is none."""
    path = directory / CONFIG_NAME
    document = parse_config(read_small_file(directory, CONFIG_NAME, MAX_CONFIG_BYTES), str(path))
    value = document.get("max_position_embeddings", sys.maxsize)
    if type(value) is not int or value < 2:
        raise CheckpointError(
            f"{path}: max_position_embeddings is {str(value)[:100]!r}, expected a whole number of at least 2"
        )
    return value


def _check_length(length: int, positions: int, where: str) -> None:
    if length > positions:
        raise UsageError(
            f"{where} {length:,}: expected at most max_position_embeddings, {positions:,}; "
            "give a smaller --length"
        )


def _tokenizer_if_any(directory: Path) -> Tokenizer | None:
    """Returns the tokenizer if it can be read: ids are run without it, too."""
    try:
        return read_tokenizer(directory)
    except Dsv3Error:
        return None


def _read_text(path: Path | None) -> str:
    if path is None:
        return resources.files(__package__).joinpath(_BUILT_IN).read_text(encoding="utf-8")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _MAX_TEXT_BYTES:
        raise CheckpointError(
            f"{path}: too much text, expected at most {_MAX_TEXT_BYTES:,} bytes; give a part of it"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: byte {error.start:,} is {content[error.start]:#04x}, expected UTF-8 text; convert it, "
            "for example with iconv"
        ) from None


def _as_array(ids: Sequence[int]) -> Ids:
    import numpy as np

    return np.array(ids, np.int64)


def _choose_length(ids_T: Ids, choices: Sequence[int], max_tokens: int | None) -> int:
    """Returns the first length that gives enough sequences of the tokens that may be used, or the last."""
    count = len(ids_T) if max_tokens is None else min(len(ids_T), max_tokens)
    return next((length for length in choices if count >= _ENOUGH * length), choices[-1])


def _check_size(rows_BL: Ids, where: str) -> None:
    if not len(rows_BL) or rows_BL.shape[1] < 2:
        raise CheckpointError(
            f"{where}: got {len(rows_BL)} x {rows_BL.shape[1]} tokens, expected at least one sequence of 2"
        )


def _check_ids(rows_BL: Ids, vocab_size: int, where: Path) -> None:
    """Refuses what the model's vocabulary does not have."""
    import numpy as np

    outside = np.argwhere((rows_BL < 0) | (rows_BL >= vocab_size))
    if len(outside):
        sequence, position = outside[0].tolist()
        found = rows_BL[sequence, position]
        raise CheckpointError(
            f"{where}: sequence {sequence}, position {position} (from 0): token {found}, "
            f"expected 0 to vocab_size - 1, {vocab_size - 1}; use this model's own tokenizer"
        )


def _as_tensor(rows_BL: Ids) -> Tensor:
    """Returns a copy that no longer needs the file."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(rows_BL, np.int64, order="C"))
