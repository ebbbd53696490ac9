"""Files with one JSON object in each line: texts, conversations or token ids, as one stream of ids.

A conversation goes through the checkpoint's own chat template, in Jinja's sandbox, as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.config import MAX_CONFIG_BYTES, parse_config
from dsv3_tools.checkpoint.paths import read_small_file
from dsv3_tools.errors import CheckpointError
from dsv3_tools.model.tokenizer import Tokenizer, read_tokenizer

__all__ = ["read_documents"]

_TEMPLATE_NAME = "chat_template.jinja"
_CONFIG_NAME = "tokenizer_config.json"


def read_documents(text: str, path: Path, directory: Path) -> list[int]:
    """Returns the ids of all lines, one after the other; text needs the tokenizer, ids don't.

    Args:
        text: of the file.
        path: for messages.
        directory: with tokenizer and chat template.

    Raises:
        CheckpointError: a line is not such an object, or there is no chat template for it.
        UsageError: text without the library `tokenizers`.
    """

    @lru_cache(maxsize=1)
    def tokenizer() -> Tokenizer:
        return read_tokenizer(directory)

    @lru_cache(maxsize=1)
    def template() -> Callable[..., str]:
        return _template(directory)

    ids: list[int] = []
    for where, line in _lines(text, path):
        if isinstance(line.get("input_ids"), list):
            ids += _check_ids(line["input_ids"], where)
        elif isinstance(line.get("text"), str):
            ids += tokenizer().encode(line["text"])
        elif isinstance(line.get("messages"), list):
            ids += tokenizer().encode(_render(template(), line["messages"], where))
        else:
            found = ", ".join(map(repr, list(line)[:5])) or "nothing"
            raise CheckpointError(
                f"{where}: got an object with {found}, expected 'text' (a string), 'messages' (a list) or "
                "'input_ids' (a list)"
            )
    return ids


def _lines(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number:,}"
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: not JSON: {error}") from None
        if not isinstance(document, dict):
            raise CheckpointError(f"{where}: got {type(document).__name__}, expected an object")
        yield where, document


def _check_ids(ids: Sequence[Any], where: str) -> list[int]:
    wrong = next((one for one in ids if type(one) is not int or not 0 <= one < 1 << 31), None)
    if wrong is not None:
        raise CheckpointError(f"{where}: input_ids has {str(wrong)[:50]!r}, expected token ids")
    return list(ids)


def _template(directory: Path) -> Callable[..., str]:
    """Returns the function that renders the checkpoint's chat template.

    Raises:
        CheckpointError: there is none, or it is no template.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source, tokens = _template_source(directory)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{directory}: the chat template cannot be read: {error}") from None
    return lambda messages: template.render(messages=messages, add_generation_prompt=False, **tokens)


def _template_source(directory: Path) -> tuple[str, dict[str, str]]:
    """Returns the template, and the special tokens that it may name."""
    config: Mapping[str, Any] = {}
    if (directory / _CONFIG_NAME).exists():
        content = read_small_file(directory, _CONFIG_NAME, MAX_CONFIG_BYTES)
        config = parse_config(content, str(directory / _CONFIG_NAME))
    tokens = {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name)
        tokens[name] = str(value.get("content", "") if isinstance(value, dict) else value or "")
    if (directory / _TEMPLATE_NAME).exists():
        content = read_small_file(directory, _TEMPLATE_NAME, MAX_CONFIG_BYTES)
        return content.decode("utf-8", "replace"), tokens
    if isinstance(config.get("chat_template"), str):
        return config["chat_template"], tokens
    raise CheckpointError(
        f"{directory}: neither {_TEMPLATE_NAME} nor a chat_template in {_CONFIG_NAME}, which 'messages' "
        "need; give 'text' instead"
    )


def _render(template: Callable[..., str], messages: Sequence[Any], where: str) -> str:
    try:
        return template(messages)
    except Exception as error:  # whatever the template does with what it was not made for
        raise CheckpointError(f"{where}: the chat template does not take these messages: {error}") from None


def _refuse(message: str) -> None:
    raise ValueError(message)
