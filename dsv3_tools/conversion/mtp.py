"""The planner of `split-mtp`: the model without its MTP module, and the module alone, as copies of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv3_tools.checkpoint.architecture import mtp_copies
from dsv3_tools.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES, with_quantization
from dsv3_tools.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES, parse_metadata
from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.mtp_config import nextn_config, without_mtp
from dsv3_tools.conversion.plan import SOURCE, Plan, Step, TensorRef
from dsv3_tools.conversion.planning import check_plan, finish_plan, read_stored
from dsv3_tools.errors import CheckpointError, UsageError
from dsv3_tools.formats import Dense
from dsv3_tools.formats.stored import Stored, StoredWeight

__all__ = ["LAYOUTS", "Halves", "copy_step", "plan_split_main", "plan_split_mtp", "read_halves", "renumbered"]

LAYOUTS = ("native", "sglang-nextn")
"""The module under its own layer number (vLLM, LMDeploy), or as layer 0 of a model of its own (SGLang)."""

_LEFT_OUT = "of the MTP module"
_OF_MAIN = "of the main model"
_SHARED = "the main model has the same; merge-mtp puts it back"


@dataclass(frozen=True)
class Halves:
    """What a checkpoint stores: weights of the model itself and of its MTP module."""

    stored: Stored
    main: tuple[StoredWeight, ...]
    mtp: tuple[StoredWeight, ...]


def read_halves(checkpoint: Checkpoint) -> Halves:
    """Returns the weights of the model itself, and those of its MTP module.

    Raises:
        FormatError: a quantization that is not known here.
        CheckpointError: there are layers that `config.json` does not count.
    """
    config, stored = checkpoint.config, read_stored(checkpoint)
    strays = [
        weight.full_name
        for weight in stored.weights
        if weight.name.layer is not None and weight.name.layer >= config.mtp_layers.stop
    ]
    if strays:
        raise CheckpointError(
            f"{checkpoint.where(CONFIG_NAME)}: num_hidden_layers {config.num_hidden_layers} and "
            f"num_nextn_predict_layers {config.num_nextn_predict_layers} leave out {len(strays)} tensors of "
            f"later layers: {list_names(strays)}; if they are an MTP module, count its layers in config.json"
        )
    mtp = tuple(weight for weight in stored.weights if weight.name.layer in config.mtp_layers)
    main = tuple(weight for weight in stored.weights if weight.name.layer not in config.mtp_layers)
    return Halves(stored, main, mtp)


def plan_split_main(
    checkpoint: Checkpoint, halves: Halves, *, max_shard_size: int | None = None, partial: bool = False
) -> Plan:
    """Returns the plan that copies everything but the MTP module.

    Args:
        checkpoint: in any format.
        halves: what it stores.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the checkpoint is only a part of the model that its `config.json` describes.

    Raises:
        CheckpointError: there is nothing to split.
        PlanError: tensors that do not add up, all of them.
    """
    _require_both(checkpoint, halves)
    steps = [copy_step(weight) for weight in halves.main]
    dropped = _names(checkpoint, halves.mtp, _LEFT_OUT)
    check_plan(checkpoint, halves.stored, steps, partial=partial, dropped=dropped)
    config = without_mtp(checkpoint.config_json, halves.main, halves.mtp)
    return _finish(checkpoint, "main", {}, steps, config, max_shard_size, dropped)


def plan_split_mtp(
    checkpoint: Checkpoint,
    halves: Halves,
    *,
    layout: str = "native",
    drop_shared: bool = False,
    allow_different_shared: bool = False,
    max_shard_size: int | None = None,
    partial: bool = False,
) -> Plan:
    """Returns the plan that copies the MTP module alone.

    Args:
        checkpoint: in any format.
        halves: what it stores.
        layout: one of `LAYOUTS`.
        drop_shared: leave out what the main model has as well; "sglang-nextn" always does.
        allow_different_shared: go on if that is not the same in the main model, bit for bit.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the checkpoint is only a part of the model that its `config.json` describes.

    Raises:
        UsageError: an unknown layout, or one that does not hold so many layers.
        CheckpointError: there is nothing to split.
        PlanError: tensors that do not add up, all of them.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    _require_both(checkpoint, halves)
    layers, nextn = checkpoint.config.mtp_layers, layout == "sglang-nextn"
    if nextn and len(layers) > 1:
        raise UsageError(
            f"--layout sglang-nextn: holds one MTP layer (SGLang drafts with one), {checkpoint.source}"
            f" has {len(layers)}; use --layout native"
        )
    copies = mtp_copies(checkpoint.config)
    gone = [weight for weight in halves.mtp if weight.full_name in copies and (drop_shared or nextn)]
    kept = [weight for weight in halves.mtp if weight not in gone]
    steps = [copy_step(renumbered(weight, 0) if nextn else weight) for weight in kept]
    dropped = _names(checkpoint, halves.main, _OF_MAIN) | _names(checkpoint, gone, _SHARED)
    check_plan(checkpoint, halves.stored, steps, partial=partial, dropped=dropped)
    options = {"layout": layout, "drop_shared": drop_shared or nextn}
    options["allow_different_shared"] = allow_different_shared
    config = nextn_config(checkpoint.config_json, layers.start) if nextn else checkpoint.config_json
    if all(isinstance(weight.format, Dense) for weight in kept) and "quantization_config" in config:
        config = with_quantization(config, None)
    plan = _finish(checkpoint, "mtp", options, steps, config, max_shard_size, dropped)
    pairs = () if allow_different_shared else tuple(copies.items())
    there = [pair for pair in pairs if all(name in checkpoint.specs for name in pair)]
    return replace(plan, identical=tuple((TensorRef(copy), TensorRef(original)) for copy, original in there))


def copy_step(weight: StoredWeight, origin: str = SOURCE) -> Step:
    """Returns the step that copies a weight in the format that it has, under the name that it has now."""
    fmt = weight.format
    outputs = {part: f"{weight.name.prefix}.{part}" for part in fmt.part_names}
    if isinstance(fmt, Dense):
        outputs = {"weight": weight.full_name}
    inputs = {part: TensorRef(name, origin) for part, name in weight.parts.items()}
    return Step(weight.shape, inputs, outputs, fmt, fmt, fmt.code_dtype)


def renumbered(weight: StoredWeight, layer: int) -> StoredWeight:
    """Returns a weight of a layer under the name that it has in another layer; its tensors keep theirs."""
    name = weight.name
    prefix = f"model.layers.{layer}." + name.prefix.removeprefix(f"model.layers.{name.layer}.")
    return replace(weight, name=replace(name, prefix=prefix, layer=layer))


def _require_both(checkpoint: Checkpoint, halves: Halves) -> None:
    """Refuses a checkpoint that has only one of the two.

    Raises:
        CheckpointError: saying which one is missing.
    """
    if halves.mtp and halves.main:
        return
    if halves.mtp:
        raise CheckpointError(f"{checkpoint.source}: holds an MTP module alone, there is nothing to split")
    count = checkpoint.config.num_nextn_predict_layers
    if count:
        raise CheckpointError(
            f"{checkpoint.source}: config.json says num_nextn_predict_layers {count}, but the weights of "
            "the MTP module are missing, there is nothing to split; set it to 0"
        )
    raise CheckpointError(f"{checkpoint.source}: has no MTP module, there is nothing to split")


def _names(checkpoint: Checkpoint, weights: Sequence[StoredWeight], reason: str) -> dict[str, str]:
    """Returns the tensors of `weights` that are there, each with the reason why it is left out."""
    return {name: reason for w in weights for name in w.parts.values() if name in checkpoint.specs}


def _finish(
    checkpoint: Checkpoint,
    half: str,
    options: Mapping[str, Any],
    steps: Sequence[Step],
    config: Mapping[str, Any],
    max_shard_size: int | None,
    dropped: Mapping[str, str],
) -> Plan:
    """Returns the plan; without `max_shard_size` every tensor stays where it was, beside its scale or not."""
    if max_shard_size is None:
        steps = [part for step in steps for part in step.by_part()]
    operation = f"split-mtp --{half}"
    plan = finish_plan(checkpoint, operation, options, steps, config, max_shard_size, dropped=dropped)
    if config == checkpoint.config_json:
        text = checkpoint.read_file(CONFIG_NAME, MAX_CONFIG_BYTES)
        plan = replace(plan, config=text)
    if max_shard_size is not None or not checkpoint.has_index:
        return plan
    return replace(plan, restoring=_restoring(checkpoint, plan))


def _restoring(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Returns what merging needs to give back the source's own shards and index."""
    homes = checkpoint.weight_map
    index = checkpoint.read_file(INDEX_NAME, MAX_INDEX_BYTES)
    return {
        "shards": {shard.name: homes[shard.steps[0].weight.name] for shard in plan.shards},
        "tensors": {name: homes[name] for name, reason in plan.dropped.items() if reason == _SHARED},
        "index_metadata": parse_metadata(index, INDEX_NAME),
        "config": checkpoint.read_file(CONFIG_NAME, MAX_CONFIG_BYTES).decode(),
    }
