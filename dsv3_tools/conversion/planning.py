"""What all planners share: from steps to a plan, having refused whatever does not add up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv3_tools.checkpoint.architecture import differences
from dsv3_tools.checkpoint.config import CONFIG_NAME, encode_config
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import HubRepo
from dsv3_tools.conversion.card_facts import source_card
from dsv3_tools.conversion.checking import check_steps
from dsv3_tools.conversion.layout import Location, lay_out
from dsv3_tools.conversion.plan import SOURCE, Plan, SourceFile, Step, TensorRef
from dsv3_tools.errors import CheckpointError
from dsv3_tools.formats import INT4AWQ, Dense, Format
from dsv3_tools.formats.stored import Stored, StoredWeight, find_weights, read_formats

__all__ = [
    "LIKE",
    "MAX_SIDE_FILE_BYTES",
    "check_plan",
    "finish_plan",
    "read_stored",
    "recode_step",
    "repositories",
    "require_work",
    "source_files",
]

MAX_SIDE_FILE_BYTES = 100_000_000
"""Tokenizers are up to 30 MB; small files are held in memory."""

LIKE = "like"


def read_stored(checkpoint: Checkpoint) -> Stored:
    """Returns what the checkpoint stores, in the formats that its `config.json` states.

    Raises:
        FormatError: a quantization that is not known here.
    """
    where = checkpoint.where(CONFIG_NAME)
    formats = read_formats(checkpoint.config_json, where)
    stored = find_weights(checkpoint.specs, formats)
    awq = next(((w, w.format) for w in stored.weights if isinstance(w.format, INT4AWQ)), None)
    if awq is None or not _has_no_zero_points(checkpoint, *awq):
        return stored
    symmetric = [replace(fmt, symmetric=True) for fmt in formats if isinstance(fmt, INT4AWQ)]
    return find_weights(checkpoint.specs, symmetric)


def _has_no_zero_points(checkpoint: Checkpoint, weight: StoredWeight, fmt: INT4AWQ) -> bool:
    """Whether an AWQ weight is symmetric, which no config says: the one look at data that a plan takes.

    That all others are alike is checked when they are read.
    """
    known = replace(fmt, symmetric=True).fixed(weight.shape)
    return all(
        weight.parts[part] in checkpoint.specs and checkpoint.read_alone(weight.parts[part]) == content
        for part, content in known.items()
    )


def recode_step(weight: StoredWeight, target: Format) -> Step:
    """Returns the step that takes a weight to `target` format: a byte copy if it has it already."""
    own = weight.format
    if isinstance(own, Dense) and own == target:
        return Step.copy(weight.full_name, own.parts(weight.shape)["weight"])
    if isinstance(target, Dense):
        outputs = {"weight": weight.full_name}
    else:
        outputs = {part: f"{weight.name.prefix}.{part}" for part in target.part_names}
    inputs = {part: TensorRef(name) for part, name in weight.parts.items()}
    return Step(weight.shape, inputs, outputs, own, target, own.code_dtype)


def check_plan(
    checkpoint: Checkpoint,
    stored: Stored,
    steps: Sequence[Step],
    *,
    partial: bool,
    refused: Mapping[str, str] | None = None,
    dropped: Mapping[str, str] | None = None,
    like: Checkpoint | None = None,
) -> None:
    """Refuses, in one message, whatever does not add up.

    Args:
        checkpoint: the source.
        stored: what it stores.
        steps: what is to be done with it.
        partial: it is only a part of the model that its `config.json` describes.
        refused: what else the planner could not place.
        dropped: tensors left out, with the reason.
        like: the checkpoint of origin "like".

    Raises:
        PlanError: with every problem found.
    """
    incomplete = [] if partial else list(differences(checkpoint.config, stored.logical))
    if incomplete:
        incomplete[-1] += " (--partial converts what is there)"
    check_steps(
        str(checkpoint.source),
        {origin: other.specs for origin, other in _origins(checkpoint, like).items()},
        steps,
        dropped=dropped or {},
        refused={**stored.refused, **(refused or {})},
        others=incomplete,
    )


def finish_plan(
    checkpoint: Checkpoint,
    operation: str,
    options: Mapping[str, Any],
    steps: Sequence[Step],
    config: Mapping[str, Any],
    max_shard_size: int | None,
    *,
    like: Checkpoint | None = None,
    others: Mapping[str, Checkpoint] | None = None,
    dropped: Mapping[str, str] | None = None,
    location: Callable[[Step], Location] | None = None,
    keep_names: bool = False,
) -> Plan:
    """Returns the plan of steps that have been checked.

    Args:
        checkpoint: the source.
        operation: the command.
        options: whatever changes the bytes written.
        steps: in any order.
        config: the new `config.json`.
        max_shard_size: bytes of tensors in an output shard; None keeps the shards of `location`.
        like: the checkpoint of origin "like".
        others: checkpoints of more origins.
        dropped: tensors left out, with the reason.
        location: where a step's weight is; None is for weights of the source alone.
        keep_names: shards have the names in `location`.
    """
    travel, stay = checkpoint.side_files()
    checkpoints = {**_origins(checkpoint, like), **(others or {})}
    place = location or (lambda step: checkpoint.location(step.weight.name))
    return Plan(
        operation=operation,
        options=dict(options) | {"max_shard_size": max_shard_size, "like": like is not None},
        shards=lay_out(steps, place, max_shard_size, keep_names=keep_names),
        dropped=dict(dropped or {}),
        config=encode_config(config),
        side_files=tuple(travel),
        left_behind=tuple(stay),
        source_files=source_files(checkpoints, travel),
        nbytes_in=checkpoint.nbytes,
        repositories=repositories(checkpoints),
        source_card=source_card(checkpoint),
    )


def require_work(checkpoint: Checkpoint, steps: Sequence[Step], what: str) -> None:
    """Refuses a plan that would only copy.

    Raises:
        CheckpointError: every step is a copy.
    """
    if all(step.is_copy for step in steps):
        raise CheckpointError(f"{checkpoint.source}: {what}")


def _origins(checkpoint: Checkpoint, like: Checkpoint | None) -> dict[str, Checkpoint]:
    return {SOURCE: checkpoint} | ({LIKE: like} if like is not None else {})


def source_files(checkpoints: Mapping[str, Checkpoint], travel: Sequence[str]) -> tuple[SourceFile, ...]:
    """Returns what a run reads: the shards of all origins, the config, and the files that `travel`."""
    files = [
        SourceFile(origin, shard.name, shard.nbytes, shard.mtime_ns, shard.ctime_ns, shard.header_sha256)
        for origin, checkpoint in checkpoints.items()
        for shard in checkpoint.shards.values()
    ]
    files += [_small_file(checkpoints[SOURCE], name) for name in (CONFIG_NAME, *travel)]
    return tuple(files)


def repositories(checkpoints: Mapping[str, Checkpoint]) -> dict[str, HubRepo]:
    """Returns those of a run's sources that are on the Hub, by origin."""
    return {origin: c.source for origin, c in checkpoints.items() if isinstance(c.source, HubRepo)}


def _small_file(checkpoint: Checkpoint, name: str) -> SourceFile:
    """Returns a file that is known by its content alone: touching it changes nothing."""
    data = checkpoint.read_file(name, MAX_SIDE_FILE_BYTES)
    return SourceFile(SOURCE, name, len(data), 0, 0, hashlib.sha256(data).hexdigest())
