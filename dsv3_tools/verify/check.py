"""Would an engine load this checkpoint? Asked of rules about the engine, from headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dsv3_tools.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import Source, SourceLike
from dsv3_tools.engines import ENGINES, ModelView, Verdict, verdict
from dsv3_tools.errors import UsageError

__all__ = ["CheckReport", "check"]


@dataclass(frozen=True)
class CheckReport:
    """What engines would do with a checkpoint.

    Attributes:
        directory: the checkpoint.
        engine: the engine that was asked about; None for all.
        tp: tensor-parallel ranks.
        verdicts: by engine, of the one or of all.
    """

    directory: Source
    engine: str | None
    tp: int
    verdicts: dict[str, Verdict]

    @property
    def passed(self) -> bool:
        """Whether the engine asked about loads it; without one, there is nothing to fail."""
        return self.engine is None or self.verdicts[self.engine].loads

    @property
    def problems(self) -> tuple[str, ...]:
        """What stops the engine that was asked about, or makes it read wrong numbers."""
        if self.engine is None:
            return ()
        return tuple(problem.message for problem in self.verdicts[self.engine].failures)


def check(directory: SourceLike, *, engine: str | None = None, tp: int = 1) -> CheckReport:
    """Returns what an engine would refuse or misread in a checkpoint; no weight is read, no engine is run.

    Example:
        >>> report = check("miniature/checkpoint", engine="vllm")
        >>> report.passed, report.problems
        (True, ())
        >>> [name for name, found in check("miniature/checkpoint").verdicts.items() if found.loads]
        ['vllm', 'sglang', 'lmdeploy', 'tensorrt-llm', 'lightllm']

    Args:
        directory: a checkpoint.
        engine: a name in `dsv3_tools.engines.ENGINES`; None for all of them.
        tp: tensor-parallel ranks that would share the weights.

    Returns:
        The verdicts; an engine that would not load it is a finding, not an exception.

    Raises:
        UsageError: no such engine, or no ranks.
        CheckpointError: not a checkpoint of the family, or one whose files do not agree.
    """
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"engine {str(engine)[:100]!r}: not known, expected one of {', '.join(ENGINES)}")
    if tp < 1:
        raise UsageError(f"tp: got {tp}, expected at least 1 rank")
    with Checkpoint(directory) as checkpoint:
        view = ModelView(
            checkpoint.specs,
            checkpoint.config_json,
            checkpoint.weight_map,
            has_index_metadata=_has_metadata(checkpoint),
        )
        names = list(ENGINES) if engine is None else [engine]
        return CheckReport(checkpoint.source, engine, tp, {name: verdict(view, name, tp) for name in names})


def _has_metadata(checkpoint: Checkpoint) -> bool:
    """Whether the index has its metadata; without an index, nobody asks."""
    if not checkpoint.has_index:
        return True
    return "metadata" in json.loads(checkpoint.read_file(INDEX_NAME, MAX_INDEX_BYTES))
