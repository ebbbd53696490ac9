"""All rules, and what they come to for an engine.

Three kinds of findings: "refused" (the engine stops), "misread" (it goes on with wrong numbers, which is
worse) and "note". A checkpoint loads if there are only notes: everything in it is read, the MTP module
included, and read right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv3_tools.engines import (
    rules_config,
    rules_consistency,
    rules_experts,
    rules_modules,
    rules_mtp,
    rules_parallel,
    rules_tensors,
)
from dsv3_tools.engines.data import ENGINES
from dsv3_tools.engines.engine import Engine
from dsv3_tools.engines.model import ModelView
from dsv3_tools.engines.problems import Problem

__all__ = ["PARALLEL_RULES", "RULES", "Verdict", "verdict", "verdicts"]

Rule = Callable[[ModelView, Engine], Iterator[Problem]]
ParallelRule = Callable[[ModelView, Engine, int], Iterator[Problem]]

RULES: tuple[Rule, ...] = (
    *rules_config.RULES,
    *rules_consistency.RULES,
    *rules_tensors.RULES,
    *rules_modules.RULES,
    *rules_experts.RULES,
    *rules_mtp.RULES,
)
"""Rules whatever the number of ranks."""

PARALLEL_RULES: tuple[ParallelRule, ...] = rules_parallel.RULES
"""Rules that ask how many tensor-parallel ranks share the weights."""

_ORDER = {"refused": 0, "misread": 1, "note": 2}


@dataclass(frozen=True)
class Verdict:
    """What one engine would do with a checkpoint.

    Attributes:
        engine: its name.
        version: the version that the rules are about.
        loads: whether it reads everything, and reads it right.
        problems: the findings, those that stop it first.
    """

    engine: str
    version: str
    loads: bool
    problems: tuple[Problem, ...]

    @property
    def failures(self) -> tuple[Problem, ...]:
        """The findings that are more than notes."""
        return tuple(problem for problem in self.problems if problem.severity != "note")

    @property
    def notes(self) -> tuple[Problem, ...]:
        """The findings that stop nothing."""
        return tuple(problem for problem in self.problems if problem.severity == "note")


def verdict(view: ModelView, engine: str, tp: int = 1) -> Verdict:
    """Returns what one engine, a name in `data.ENGINES`, would do with `tp` tensor-parallel ranks.

    Raises:
        CheckpointError: the configuration is not of the family.
    """
    found = ENGINES[engine]
    problems = [problem for rule in RULES for problem in rule(view, found)]
    problems += [problem for rule in PARALLEL_RULES for problem in rule(view, found, tp)]
    problems.sort(key=lambda problem: _ORDER[problem.severity])
    loads = all(problem.severity == "note" for problem in problems)
    return Verdict(engine, found.version, loads, tuple(problems))


def verdicts(view: ModelView, tp: int = 1) -> dict[str, Verdict]:
    """Returns what every engine would do, by name.

    Raises:
        CheckpointError: the configuration is not of the family.
    """
    return {name: verdict(view, name, tp) for name in ENGINES}
