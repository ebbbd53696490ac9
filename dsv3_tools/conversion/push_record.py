"""`dsv3_push.json`: where on the Hub a result is, and which of its files were removed here for that."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dsv3_tools.checkpoint.durable import write_file
from dsv3_tools.checkpoint.manifest import PUSH_NAME
from dsv3_tools.checkpoint.source import HubRepo

__all__ = ["PushRecord", "read_push_record"]


@dataclass(frozen=True)
class PushRecord:
    """Where a result is: the model at a branch and commit, and the names of what is only there."""

    repo: HubRepo
    removed: frozenset[str]

    def write(self, directory: Path) -> None:
        """Writes the record beside what is left of the result."""
        document = {**self.repo.record(), "removed": sorted(self.removed)}
        text = json.dumps(document, indent=2).encode() + b"\n"
        write_file(directory / PUSH_NAME, text, folder=directory)

    def is_at(self, name: str, revision: str, *, create_pr: bool) -> bool:
        """Whether it is about this model and branch, or a pull request to it."""
        branch = self.repo.revision.startswith("refs/pr/") if create_pr else self.repo.revision == revision
        return self.repo.name == name and branch


def read_push_record(directory: Path) -> PushRecord | None:
    """Returns the record that is there; None without one that can be read."""
    try:
        document = json.loads((directory / PUSH_NAME).read_bytes())
        repo = HubRepo(document["repo"], document["revision"], document["commit"])
        return PushRecord(repo, frozenset(document["removed"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
