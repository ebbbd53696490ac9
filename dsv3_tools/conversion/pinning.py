"""A run from the Hub stays with the commit it began with, whatever its branch moves to meanwhile."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dsv3_tools.checkpoint.source import Source, SourceLike, parse_source
from dsv3_tools.conversion.plan import SOURCE
from dsv3_tools.conversion.workspace import Workspace

__all__ = ["pinned"]


def pinned(source: SourceLike, destination: str | os.PathLike[str] | None, *, origin: str = SOURCE) -> Source:
    """Returns a source, at the commit with which an unfinished run into `destination` began.

    Args:
        source: what the user named.
        destination: where the run writes; None for a result that is not asked for.
        origin: what the source is for the run.
    """
    parsed = parse_source(source)
    if destination is None or isinstance(parsed, Path) or parsed.commit is not None:
        return parsed
    begun = Workspace(Path(destination)).begun_repositories().get(origin)
    same = begun is not None and (begun.name, begun.revision) == (parsed.name, parsed.revision)
    return replace(parsed, commit=begun.commit) if same and begun is not None else parsed
