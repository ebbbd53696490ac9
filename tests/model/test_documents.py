"""Lines of JSON as calibration data: texts, conversations through the chat template, ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv3_tools.errors import CheckpointError
from dsv3_tools.model.documents import read_documents
from dsv3_tools.model.tokenizer import read_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"


def lines(*documents: Any) -> str:
    return "\n".join(json.dumps(one) for one in documents) + "\n\n"


@pytest.fixture
def folder(miniature: Path, tmp_path: Path) -> Path:
    """A tokenizer with a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(miniature / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_all_kinds_one_after_the_other(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    messages = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "ok"}]
    text = lines({"text": "def f(x):"}, {"input_ids": [5, 6]}, {"messages": messages}, {"text": ""})
    eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    eos = eos["content"] if isinstance(eos, dict) else eos
    expected = [*tokenizer.encode("def f(x):"), 5, 6]
    expected += tokenizer.encode(f"<user>import os<assistant>ok{eos}")
    assert read_documents(text, Path("x.jsonl"), folder) == expected


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    assert read_documents(lines({"input_ids": [1, 2]}, {"input_ids": [3]}), Path("x"), tmp_path) == [1, 2, 3]


REFUSED = {
    "not json": ("{", "line 1: not JSON"),
    "a list": ("[1]", "got list, expected an object"),
    "nothing known": ('{"content": "x"}', "got an object with 'content', expected 'text' "),
    "no string": ('{"text": null}', "expected 'text' "),
    "ids": ('{"input_ids": [1, "2"]}', "input_ids has '2', expected token ids"),
    "negative": ('{"input_ids": [1, -2]}', "input_ids has '-2'"),
    "messages": ('{"messages": [1]}', "the chat template does not take these messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].role + 'x' }}{{ raise_exception('no') }}")
    text, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        read_documents(text, Path("x.jsonl"), folder)


def test_a_template_cannot_reach_out(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(CheckpointError, match="does not take these messages"):
        read_documents(lines({"messages": []}), Path("x.jsonl"), folder)


def test_without_a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="which 'messages' need; give 'text' instead"):
        read_documents(lines({"messages": []}), Path("x.jsonl"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{% for"}))
    with pytest.raises(CheckpointError, match="the chat template cannot be read"):
        read_documents(lines({"messages": []}), Path("x.jsonl"), folder)
