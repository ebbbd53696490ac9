"""A checkpoint's own tokenizer: `tokenizer.json`, read by the library `tokenizers`.

The library is an optional extra and is imported when a tokenizer is read. BOS is not part of a text's tokens
here; `bos_id` says what every sequence begins with. Published checkpoints say so in one of two places:

- The post-processor of `tokenizer.json` puts BOS first.
- `tokenizer_config.json` has `add_bos_token` and `bos_token`. DeepSeek-V3 has only this: its post-processor
  adds nothing. transformers 4 makes one from the two keys; transformers 5 (5.23) does not and leaves BOS
  out, which is not what the files say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.config import MAX_CONFIG_BYTES, parse_config
from dsv3_tools.checkpoint.paths import read_small_file
from dsv3_tools.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TOKENIZER_FILES", "TOKENIZER_NAME", "Tokenizer", "read_tokenizer"]

TOKENIZER_NAME = "tokenizer.json"

_CONFIG_NAME = "tokenizer_config.json"

TOKENIZER_FILES = (TOKENIZER_NAME, _CONFIG_NAME)
"""What a tokenizer is read from."""
_MAX_TOKENIZER_BYTES = 200_000_000
_NOT_READ = ("tiktoken.model", "tokenizer.model")
"""Vocabularies without the rules by which text is split; those are in Python code beside them."""

_INSTEAD = "give token ids (.npy or .safetensors) instead of text"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        bos_id: the token that every sequence begins with; None if the model knows no such thing.
    """

    _library: tokenizers.Tokenizer
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without BOS.

        What looks like a special token is one, as transformers has it by default
        (`split_special_tokens=False`).
        """
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some tokens, special ones included.

        Bytes that are no whole character give U+FFFD. An id that the tokenizer does not have, such as those
        that fill up the vocabulary of the model, is given as `<id>`.
        """
        parts = []
        for is_known, run in groupby(ids, key=lambda one: self._library.id_to_token(one) is not None):
            if is_known:
                parts.append(self._library.decode(list(run), skip_special_tokens=False))
            else:
                parts += [f"<{one}>" for one in run]
        return "".join(parts)


def read_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer of a checkpoint.

    Raises:
        CheckpointError: there is none, or none that can be read, or it contradicts itself.
        UsageError: the library is not installed.
    """
    path = directory / TOKENIZER_NAME
    if not path.exists():
        raise CheckpointError(f"{directory}: {_what_is_there(directory)}; {_INSTEAD}")
    try:
        import tokenizers
    except ImportError:
        raise UsageError(
            f"{path}: text needs the library tokenizers, which is not installed; "
            f"pip install 'dsv3-tools[text]', or {_INSTEAD}"
        ) from None
    content = read_small_file(directory, TOKENIZER_NAME, _MAX_TOKENIZER_BYTES)
    try:
        library = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library has no class of its own
        raise CheckpointError(f"{path}: not a tokenizer: {error}; {_INSTEAD}") from None
    library.no_truncation()
    library.no_padding()
    return Tokenizer(library, _bos_id(library, directory))


def _what_is_there(directory: Path) -> str:
    for name in _NOT_READ:
        if (directory / name).exists():
            return f"got {name}, expected {TOKENIZER_NAME}: the tokenizer is Python code, which is not run"
    return f"there is no {TOKENIZER_NAME} to tokenize text with"


def _bos_id(library: tokenizers.Tokenizer, directory: Path) -> int | None:
    """Returns what the post-processor puts before a text, or else what `tokenizer_config.json` asks for."""
    encoding = library.encode("a")
    if encoding.special_tokens_mask[:1] == [1]:
        return encoding.ids[0]
    path = directory / _CONFIG_NAME
    if not path.exists():
        return None
    document = parse_config(read_small_file(directory, _CONFIG_NAME, MAX_CONFIG_BYTES), str(path))
    if not _adds_bos(document, path):
        return None
    bos = _bos_token(document, path)
    bos_id = library.token_to_id(bos)
    if bos_id is None:
        raise CheckpointError(
            f"{path}: bos_token is {bos[:100]!r}, expected a token of {TOKENIZER_NAME}; {_INSTEAD}"
        )
    return bos_id


def _adds_bos(document: Mapping[str, Any], path: Path) -> bool:
    value = document.get("add_bos_token")
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{path}: add_bos_token is {str(value)[:100]!r}, expected true or false")
    return bool(value)


def _bos_token(document: Mapping[str, Any], path: Path) -> str:
    value = document.get("bos_token")
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise CheckpointError(
            f"{path}: add_bos_token is true and bos_token is {str(value)[:100]!r}, expected a string, or an "
            f"object with its content; {_INSTEAD}"
        )
    return content
