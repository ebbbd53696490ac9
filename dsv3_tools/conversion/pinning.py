"""A run from the Hub stays with the commit it began with, whatever its branch moves to meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from dsv3_tools.checkpoint.source import Source, SourceLike, parse_source
from dsv3_tools.conversion.plan import SOURCE
from dsv3_tools.conversion.workspace import Workspace

__all__ = ["pinned"]


def pinned(source: SourceLike, *destinations: str | os.PathLike[str] | None, origin: str = SOURCE) -> Source:
    """Returns a source, at the commit with which an unfinished run into one of `destinations` began.

    Args:
        source: what the user named.
        destinations: where the command writes; None for a result that is not asked for.
        origin: what the source is for the run.
    """
    parsed = parse_source(source)
    if isinstance(parsed, Path) or parsed.commit is not None:
        return parsed
    for destination in destinations:
        if destination is None:
            continue
        begun = Workspace(Path(destination)).begun_repositories().get(origin)
        if begun is not None and (begun.name, begun.revision) == (parsed.name, parsed.revision):
            return begun
    return parsed
