"""What a user may name as a checkpoint, and what is meant by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3_tools.checkpoint.source import HubRepo, is_same_source, parse_source
from dsv3_tools.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deepseek-ai/DeepSeek-V3", HubRepo("deepseek-ai/DeepSeek-V3")),
        ("deepseek-ai/DeepSeek-V3@v1.0", HubRepo("deepseek-ai/DeepSeek-V3", "v1.0")),
        ("hf://deepseek-ai/DeepSeek-V3", HubRepo("deepseek-ai/DeepSeek-V3")),
        ("hf://a/b@refs/pr/3", HubRepo("a/b", "refs/pr/3")),
        (f"hf://a/b@{COMMIT}", HubRepo("a/b", COMMIT)),
        ("checkpoint", Path("checkpoint")),
        ("./a/b", Path("a/b")),
        ("a/b/c", Path("a/b/c")),
        ("/models/b", Path("/models/b")),
        ("~/b", Path("~/b")),
        ("a/b c", Path("a/b c")),
        ("a/b/", Path("a/b")),
        ("../a", Path("../a")),
    ],
)
def test_what_is_meant(text: str, expected: Path | HubRepo) -> None:
    assert parse_source(text) == expected


def test_a_directory_comes_before_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/name") == HubRepo("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_source("org/name") == Path("org/name")
    assert parse_source("hf://org/name") == HubRepo("org/name")
    assert parse_source(Path("other/name")) == Path("other/name")


@pytest.mark.parametrize("text", ["hf://", "hf://a", "hf://a/b/c", "hf://a/b@", "hf://a/b@x y", "hf://../b"])
def test_no_model(text: str) -> None:
    with pytest.raises(UsageError, match="is no model on the Hub"):
        parse_source(text)


@pytest.mark.parametrize("text", ["hf:a/b", "https://hub.invalid/a/b", "http://a/b"])
def test_almost_a_model(text: str) -> None:
    with pytest.raises(UsageError, match="a model on the Hub is named organization/name"):
        parse_source(text)


def test_names_are_read_back() -> None:
    repo = HubRepo("a/b", "main", COMMIT)
    assert str(repo) == f"hf://a/b@{COMMIT}"
    assert parse_source(str(HubRepo("a/b"))) == HubRepo("a/b")
    assert parse_source(repo) is repo


def test_the_same_source(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert is_same_source(tmp_path, tmp_path / "link")
    assert not is_same_source(tmp_path, tmp_path / "other")
    assert is_same_source(HubRepo("a/b"), HubRepo("a/b"))
    assert not is_same_source(HubRepo("a/b"), HubRepo("a/b", "v2"))
    assert not is_same_source(HubRepo("a/b"), tmp_path)
