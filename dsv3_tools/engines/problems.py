"""What a rule finds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dsv3_tools.checkpoint.names import list_names

__all__ = ["Problem", "Severity", "counted"]

Severity = Literal["refused", "misread", "note"]
"""The engine stops with an error; it goes on with wrong numbers; it loads, and this is worth knowing."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of one rule about one engine.

    Attributes:
        rule: the rule's name.
        severity: what the engine does.
        message: where: what is wrong, got, expected (why); what to do.
        source: where the rule comes from, and whether that was tried, read or only deduced.
    """

    rule: str
    severity: Severity
    message: str
    source: str


def counted(names: Iterable[str]) -> str:
    """Returns the names for a message: one alone, or the first ones and how many there are."""
    every = list(names)
    return every[0] if len(every) == 1 else f"{len(every):,} modules ({list_names(every)})"
