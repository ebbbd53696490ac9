"""What may be named as a checkpoint: a directory, or a model on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dsv3_tools.errors import UsageError

__all__ = ["HubRepo", "Source", "SourceLike", "is_model_name", "is_same_source", "parse_source"]

_SCHEME = "hf://"
_ALMOST = ("hf:", "http://", "https://")
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_REPO = re.compile(rf"(?P<name>{_NAME}/{_NAME})(?:@(?P<revision>[^@\s]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A model on the Hub.

    Attributes:
        name: organization and name, such as "deepseek-ai/DeepSeek-V3".
        revision: the branch, tag or commit that was asked for.
        commit: the full hash that `revision` had at first contact; None before that.
    """

    name: str
    revision: str = "main"
    commit: str | None = None

    def __str__(self) -> str:
        """Returns the name that a command takes, with the commit if it is known."""
        return f"{_SCHEME}{self.name}@{self.commit or self.revision}"

    def record(self) -> dict[str, str | None]:
        """Returns what a manifest says of the model."""
        return {"repo": self.name, "revision": self.revision, "commit": self.commit}


Source = Path | HubRepo
"""A checkpoint's place, once it is known which kind it is."""

SourceLike = str | os.PathLike[str] | HubRepo
"""What a caller may give for it."""


def is_model_name(name: str) -> bool:
    """Whether a model on the Hub may have this name: organization and name."""
    return re.fullmatch(f"{_NAME}/{_NAME}", name, re.ASCII) is not None


def parse_source(source: SourceLike) -> Source:
    """Returns what is meant: `hf://org/name@revision` or `org/name` on the Hub, anything else a directory.

    A directory that exists is meant before a model on the Hub; a path object is always a directory.

    Raises:
        UsageError: `hf://` without a model's name, or a URL.
    """
    if isinstance(source, HubRepo):
        return source
    if not isinstance(source, str):
        return Path(source)
    named = source.startswith(_SCHEME)
    if not named and source.startswith(_ALMOST):
        raise UsageError(f"{source[:200]}: a model on the Hub is named organization/name or {_SCHEME}...")
    match = _REPO.fullmatch(source.removeprefix(_SCHEME))
    if named and match is None:
        raise UsageError(
            f"{source[:200]}: is no model on the Hub, expected {_SCHEME}organization/name or "
            f"{_SCHEME}organization/name@revision"
        )
    if match is None or (not named and os.path.lexists(source)):
        return Path(source)
    return HubRepo(match["name"], match["revision"] or "main")


def is_same_source(one: Source, other: Source) -> bool:
    """Whether both are the same directory, by whatever link, or the same model."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    if isinstance(one, HubRepo) and isinstance(other, HubRepo):
        return (one.name, one.commit or one.revision) == (other.name, other.commit or other.revision)
    return False
