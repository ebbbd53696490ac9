"""Several results of one command: all of them are found possible before the first byte of any is written."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.making import Maker
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.preflight import filesystem
from dsv3_tools.conversion.preview import Preview, preview
from dsv3_tools.errors import DestinationError, Dsv3Error, UsageError

__all__ = ["Part", "check_together", "preview_together"]


@dataclass(frozen=True)
class Part:
    """One of the results: what is written, where, and what makes its weights if they are not recoded."""

    plan: Plan
    destination: Path
    maker: Maker | None = None


def check_together(parts: Sequence[Part], checkpoints: Mapping[str, Checkpoint], options: RunOptions) -> None:
    """Refuses runs of which one would be refused, before any of them begins.

    Raises:
        UsageError: two destinations overlap each other or a source.
        DestinationError: no room for all, or another run's files at one of them.
    """
    if len(parts) > 1:  # one alone is checked when it runs
        for found in preview_together(parts, checkpoints, options):
            if found.problem is not None:
                raise found.problem


def preview_together(
    parts: Sequence[Part], checkpoints: Mapping[str, Checkpoint], options: RunOptions
) -> list[Preview]:
    """Returns what each run would do with its destination, given the others; see `preview`."""
    previews = [preview(part.plan, checkpoints, part.destination, options, part.maker) for part in parts]
    problem = _overlap(parts) or _one_place(parts, options) or _no_room(parts, previews)
    return [found if found.problem is not None else replace(found, problem=problem) for found in previews]


def _overlap(parts: Sequence[Part]) -> Dsv3Error | None:
    for number, part in enumerate(parts):
        for other in parts[:number]:
            one, two = part.destination.resolve(), other.destination.resolve()
            same = one.exists() and two.exists() and os.path.samefile(one, two)
            if same or one.is_relative_to(two) or two.is_relative_to(one):
                return UsageError(
                    f"{part.destination} and {other.destination} are the same directory or one lies in the "
                    "other; choose two beside each other"
                )
    return None


def _one_place(parts: Sequence[Part], options: RunOptions) -> Dsv3Error | None:
    """Returns what to say of several results that would be uploaded to one model."""
    if options.hub.push is None or len(parts) == 1:
        return None
    return UsageError("--push: is for one result; split with --main or --mtp alone, or dsv3 push each")


def _no_room(parts: Sequence[Part], previews: Sequence[Preview]) -> Dsv3Error | None:
    """Returns what to say of a disk that has room for each of the results, but not for all."""
    needed: dict[int, int] = defaultdict(int)
    for part, found in zip(parts, previews, strict=True):
        if found.problem is not None:
            return None
        device = filesystem(part.destination)
        needed[device] += found.nbytes_needed
        if needed[device] > found.nbytes_free:
            return DestinationError(
                f"{part.destination}: {found.nbytes_free:,} bytes are free, the runs of this command need "
                f"{needed[device]:,}, {needed[device] - found.nbytes_free:,} more; free some space or choose "
                "another disk"
            )
    return None
