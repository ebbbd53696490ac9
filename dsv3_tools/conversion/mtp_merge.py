"""The planner of `merge-mtp`: a model and an MTP module become one checkpoint. Bytes are only copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace

from dsv3_tools.checkpoint.architecture import differences, mtp_copies
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.names import list_names, parse_name
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import is_same_source
from dsv3_tools.conversion.checking import check_steps
from dsv3_tools.conversion.layout import Location
from dsv3_tools.conversion.mtp import copy_step, renumbered
from dsv3_tools.conversion.mtp_lists import merged_config
from dsv3_tools.conversion.mtp_restore import Restoration, find_restoration
from dsv3_tools.conversion.plan import SOURCE, Plan, Step, TensorRef
from dsv3_tools.conversion.planning import finish_plan, read_stored
from dsv3_tools.errors import CheckpointError, UsageError
from dsv3_tools.formats import Dense
from dsv3_tools.formats.stored import Stored, StoredWeight

__all__ = ["MTP", "plan_merge"]

MTP = "mtp"

_ARITHMETIC = (
    "hidden_act",
    "norm_topk_prob",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
)
"""Keys of `config.json`, beside the dimensions, whose values the module's results depend on."""

_UNPROVEN = (
    "the MTP module in {} has no embed_tokens or shared_head.head of its own, by which to tell whether it is "
    "this model's; dimensions and config.json agree"
)

_NOT_COMPARED = ("is_nextn", "model_type", "num_hidden_layers", "num_nextn_predict_layers")


def plan_merge(
    main: Checkpoint,
    mtp: Checkpoint,
    *,
    allow_different_shared: bool = False,
    max_shard_size: int | None = None,
    partial: bool = False,
) -> Plan:
    """Returns the plan that puts an MTP module beside a model.

    Args:
        main: the model, in any format, without an MTP module.
        mtp: the module, in either layout, or a checkpoint that has it beside a model of its own.
        allow_different_shared: go on if what the module repeats of a model is not this one's, bit for bit.
        max_shard_size: bytes of tensors in an output shard; None keeps the shards of both, or gives back
            those of the checkpoint that the two were split from.
        partial: the checkpoints are only parts of the model that their `config.json` describe.

    Raises:
        CheckpointError: the one has a module already, or the other has none.
        UsageError: both are the same directory.
        PlanError: what does not belong together or add up, all of it.
    """
    if is_same_source(main.source, mtp.source):
        raise UsageError(f"{main.source}: is given both as the model and as the MTP module")
    layers, stored, module = _parts(main, mtp)
    copies = mtp_copies(replace(main.config, num_nextn_predict_layers=len(layers)))
    repeated = list(_repeated(copies, module, main))
    steps = [*map(copy_step, stored.weights), *(copy_step(weight, MTP) for weight in module)]
    steps += [replace(copy_step(weight), is_repetition=True) for weight in repeated]
    _check(main, mtp, stored, steps, partial=partial)
    restored = find_restoration(main, mtp) if max_shard_size is None else None
    earlier = None if restored is None else restored.config
    config = merged_config(main, mtp, stored.weights, [*module, *repeated], layers, earlier)
    if max_shard_size is None:
        steps = [part for step in steps for part in step.by_part()]
    options = {"allow_different_shared": allow_different_shared}
    plan = finish_plan(
        main,
        "merge-mtp",
        options,
        steps,
        config,
        max_shard_size,
        others={MTP: mtp},
        location=_location(main, mtp, restored),
        keep_names=restored is not None,
    )
    pairs = () if allow_different_shared else tuple(_pairs(module, copies, main))
    plan = replace(plan, nbytes_in=main.nbytes + _nbytes(mtp, module), identical=pairs)
    if restored is None and repeated:
        plan = replace(plan, notes=(_UNPROVEN.format(mtp.source),))
    if restored is not None:
        plan = replace(plan, index_metadata=restored.index_metadata)
    if restored is not None and config == restored.config:
        plan = replace(plan, config=restored.config_text)
    return plan


def _parts(main: Checkpoint, mtp: Checkpoint) -> tuple[range, Stored, list[StoredWeight]]:
    """Returns the layers that the module will be, what the model stores, and the module's weights, renamed.

    Raises:
        CheckpointError: the one has a module already, or the other has none.
    """
    if main.config.is_nextn:
        raise CheckpointError(f"{main.source}: holds an MTP module, expected the model that it is for")
    stored, own = read_stored(main), main.config.main_layers
    beyond = [w.full_name for w in stored.weights if w.name.layer is not None and w.name.layer not in own]
    if beyond:
        raise CheckpointError(
            f"{main.source}: has an MTP module already ({list_names(beyond)}); split-mtp --main makes a "
            "model without it"
        )
    layers = mtp.config.mtp_layers
    weights = [weight for weight in read_stored(mtp).weights if weight.name.layer in layers]
    if not weights:
        raise CheckpointError(f"{mtp.source}: has no weights of an MTP module")
    by = own.stop - layers.start
    return range(own.stop, own.stop + len(layers)), stored, [_moved(weight, by) for weight in weights]


def _moved(weight: StoredWeight, by: int) -> StoredWeight:
    assert weight.name.layer is not None
    return renumbered(weight, weight.name.layer + by)


def _repeated(
    copies: Mapping[str, str], module: Sequence[StoredWeight], main: Checkpoint
) -> Iterator[StoredWeight]:
    """Yields what the module lacks and has in common with the model, as the model stores it."""
    given = {weight.full_name for weight in module}
    for copy, original in copies.items():
        name, spec = parse_name(copy), main.specs.get(original)
        if copy not in given and spec is not None and name is not None:
            yield StoredWeight(name, spec.shape, Dense(spec.dtype), {"weight": original})


def _check(
    main: Checkpoint,
    mtp: Checkpoint,
    stored: Stored,
    steps: Sequence[Step],
    *,
    partial: bool,
) -> None:
    """Refuses, in one message, what does not belong together or add up.

    Raises:
        PlanError: with every problem found.
    """
    found = read_stored(mtp)
    own = tuple(f"model.layers.{layer}." for layer in mtp.config.mtp_layers)
    theirs = {name: spec for name, spec in mtp.specs.items() if name.startswith(own)}
    problems = list(_dissimilar(main, mtp))
    if not partial and not problems:
        alone = replace(main.config, num_nextn_predict_layers=0)
        problems += differences(alone, stored.logical)
        logical = {name: spec for name, spec in found.logical.items() if name.startswith(own)}
        problems += [f"{mtp.source}: {text}" for text in differences(mtp.config, logical, mtp_alone=True)]
    refused = {name: reason for name, reason in found.refused.items() if name in theirs}
    check_steps(
        str(main.source),
        {SOURCE: main.specs, MTP: theirs},
        steps,
        dropped={},
        refused={**stored.refused, **refused},
        others=problems,
        origins=(SOURCE, MTP),
    )


def _dissimilar(main: Checkpoint, mtp: Checkpoint) -> Iterator[str]:
    """Yields what `config.json` says otherwise of the module than of the model."""
    for field in fields(ModelConfig):
        ours, theirs = getattr(main.config, field.name), getattr(mtp.config, field.name)
        if field.name not in _NOT_COMPARED and ours != theirs:
            yield f"{field.name} is {ours}, that of the MTP module in {mtp.source} is {theirs}"
    if not mtp.config.is_nextn and main.config.num_hidden_layers != mtp.config.num_hidden_layers:
        yield (
            f"num_hidden_layers is {main.config.num_hidden_layers}, the MTP module in {mtp.source} is for "
            f"{mtp.config.num_hidden_layers} layers"
        )
    for key in _ARITHMETIC:
        ours, theirs = main.config_json.get(key), mtp.config_json.get(key)
        if key in main.config_json and key in mtp.config_json and ours != theirs:
            given = f"that of the MTP module in {mtp.source} is {str(theirs)[:100]}"
            yield f"{key} is {str(ours)[:100]}, {given}"


def _pairs(
    module: Sequence[StoredWeight], copies: Mapping[str, str], main: Checkpoint
) -> Iterator[tuple[TensorRef, TensorRef]]:
    for weight in module:
        original = copies.get(weight.full_name)
        if original in main.specs and original is not None:
            yield TensorRef(weight.parts["weight"], MTP), TensorRef(original)


def _nbytes(mtp: Checkpoint, module: Sequence[StoredWeight]) -> int:
    names = [name for weight in module for name in weight.parts.values()]
    return sum(mtp.specs[name].nbytes for name in names)


def _location(main: Checkpoint, mtp: Checkpoint, restored: Restoration | None) -> Callable[[Step], Location]:
    """Returns where a step's weight goes: to its place in the source of a split, or else the module last."""
    first = min(mtp.weight_map.values())

    def location(step: Step) -> Location:
        ref = step.weight
        shard, offset = (main if ref.origin == SOURCE else mtp).location(ref.name)
        target = next(iter(step.outputs.values()))
        if restored is not None:
            return restored.shard_of(ref.origin, shard, target if step.is_repetition else None), offset
        if step.is_repetition:
            return f"mtp/{first}", offset
        return f"{'main' if ref.origin == SOURCE else 'mtp'}/{shard}", offset

    return location
