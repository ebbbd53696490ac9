"""The planner of `dsv3 quantize`: integers straight from FP8 or BF16, the rest in BF16 or FP8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsv3_tools.checkpoint.config import with_quantization
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.ignore import find_unquantized, names, patterns, substrings
from dsv3_tools.conversion.layout import by_layer
from dsv3_tools.conversion.plan import Plan, Step
from dsv3_tools.conversion.planning import (
    check_plan,
    finish_plan,
    read_stored,
    recode_step,
    require_work,
)
from dsv3_tools.conversion.quantization_options import INT4Options, INT8Options
from dsv3_tools.conversion.recipes import FP8_REST, MODULES, Selection, select
from dsv3_tools.errors import CheckpointError, UsageError
from dsv3_tools.formats import (
    INT4,
    INT4AWQ,
    INT4GPTQ,
    Dense,
    Format,
    FP8Block,
    INT8Block,
)
from dsv3_tools.formats import compressed_tensors as ct
from dsv3_tools.formats.integer import IntegerFormat
from dsv3_tools.formats.recode import moves_codes
from dsv3_tools.formats.stored import Stored, StoredWeight

__all__ = ["MADE_SHARD_NBYTES", "is_made", "plan_int4", "plan_int8"]

MADE_SHARD_NBYTES = 5 * 10**9
"""Bytes of tensors in a shard whose weights are made during the run: Hugging Face's own bound."""

_FP8 = FP8Block(scale_name=ct.SCALE_NAME)


@dataclass(frozen=True)
class _Assignment:
    """Which format every weight gets.

    Attributes:
        selection: the modules that get `target`.
        target: the integer format.
        rest: what other linears get; None is BF16.
        kept_layers: layers in which nothing is quantized.
    """

    selection: Selection
    target: Format
    rest: FP8Block | None
    kept_layers: tuple[int, ...]

    def is_rest(self, weight: StoredWeight) -> bool:
        """Whether `--rest fp8` is about a weight."""
        is_linear = weight.name.module in FP8_REST and weight.name.parameter == "weight"
        is_other = weight not in self.selection and weight.name.layer not in self.kept_layers
        return self.rest is not None and is_linear and is_other

    def format_of(self, weight: StoredWeight) -> Format:
        """Returns the format that a weight gets."""
        if weight in self.selection:
            return _fitting(self.target, weight.format)
        if self.rest is not None and self.is_rest(weight):
            return self.rest
        return weight.format if isinstance(weight.format, Dense) else Dense("BF16")


def plan_int8(
    checkpoint: Checkpoint,
    options: INT8Options,
    *,
    max_shard_size: int | None = None,
    partial: bool = False,
    calibration: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the plan that quantizes every linear to INT8 but `kv_b_proj`, router, `lm_head`, `eh_proj`.

    Args:
        checkpoint: an FP8 or BF16 checkpoint, or one that is quantized otherwise.
        options: the scheme, and what is quantized.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the checkpoint is only a part of the model that `config.json` describes.
        calibration: what decides the bytes of weights that are made during the run, see `is_made`; every
            layer then has shards of its own, of `MADE_SHARD_NBYTES` unless told otherwise.

    Raises:
        FormatError: the source's quantization is not known here, or a weight does not fit the format.
        UsageError: a pattern that fits nothing, or that splits what engines load as one.
        PlanError: tensors that do not add up, all of them.
    """
    return _plan(
        checkpoint,
        "int8",
        options,
        options.format,
        None,
        max_shard_size,
        partial=partial,
        calibration=calibration,
    )


def plan_int4(
    checkpoint: Checkpoint,
    options: INT4Options,
    *,
    max_shard_size: int | None = None,
    partial: bool = False,
    calibration: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the plan that quantizes routed experts to INT4; arguments and errors as for `plan_int8`."""
    rest = _FP8 if options.rest == "fp8" else None
    return _plan(
        checkpoint,
        "int4",
        options,
        options.format,
        rest,
        max_shard_size,
        partial=partial,
        calibration=calibration,
    )


def _plan(
    checkpoint: Checkpoint,
    kind: str,
    options: INT8Options | INT4Options,
    target: Format,
    rest: FP8Block | None,
    max_shard_size: int | None,
    *,
    partial: bool,
    calibration: Mapping[str, Any] | None,
) -> Plan:
    stored = read_stored(checkpoint)
    mtp = tuple(checkpoint.config.mtp_layers)
    dropped = _dropped(checkpoint.specs, stored, mtp) if options.mtp == "drop" else {}
    kept = [weight for weight in stored.weights if weight.code_name not in dropped]
    kept_layers = mtp if options.mtp == "keep" else ()
    selection = select(
        kept, MODULES[kind], include=options.include, exclude=options.exclude, kept_layers=kept_layers
    )
    if isinstance(target, INT8Block):
        _check_experts(kept, selection)
    assigned = _Assignment(selection, target, rest, kept_layers)
    steps = [recode_step(weight, assigned.format_of(weight)) for weight in kept]
    check_plan(checkpoint, stored, steps, partial=partial, dropped=dropped)
    quantization_config = _quantization_config(kept, assigned, options, mtp)
    config = with_quantization(checkpoint.config_json, quantization_config)
    if options.mtp == "drop":
        config["num_nextn_predict_layers"] = 0
    if config == checkpoint.config_json:  # W4A8, or leaving the MTP module out, needs no new weight
        done = f"all that {kind} takes is {target.name} already; choose other options"
        require_work(checkpoint, steps, f"nothing is to be changed: {done}")
    said, operation = asdict(options), f"quantize {kind}"
    if calibration is None:
        return finish_plan(checkpoint, operation, said, steps, config, max_shard_size, dropped=dropped)
    if not any(is_made(step) for step in steps):
        raise CheckpointError(
            f"{checkpoint.source}: no weight in a layer would be quantized anew, so there is nothing to "
            "calibrate; leave out --method"
        )
    said["calibration"] = {**calibration, "max_shard_size": max_shard_size}
    place = by_layer(steps, max_shard_size or MADE_SHARD_NBYTES)
    return finish_plan(checkpoint, operation, said, steps, config, None, dropped=dropped, location=place)


def is_made(step: Step) -> bool:
    """Whether a calibrated run makes a step's codes itself: those of a layer that are not just moved."""
    if not isinstance(step.target, IntegerFormat) or step.source is None or step.is_copy:
        return False
    parsed = parse_name(step.weight.name)
    in_layer = parsed is not None and parsed.layer is not None
    return in_layer and not moves_codes(step.source, step.target)


def _check_experts(weights: Sequence[StoredWeight], selection: Selection) -> None:
    """Refuses to leave routed experts out of INT8 blocks, which SGLang has no list for.

    Raises:
        UsageError: naming one of them.
    """
    for weight in weights:
        if weight.name.is_routed_expert and weight.name.parameter == "weight" and weight not in selection:
            raise UsageError(
                f"{weight.name.prefix} would not be INT8, but SGLang, the one engine for INT8 blocks, takes "
                "all routed experts for quantized; quantize all of them, or use --scheme channel"
            )


def _dropped(specs: Mapping[str, TensorSpec], stored: Stored, mtp_layers: Sequence[int]) -> dict[str, str]:
    """Returns the tensors of the MTP module.

    Raises:
        UsageError: there is none.
    """
    found = {
        name: "the MTP module is left out (--mtp drop)"
        for weight in stored.weights
        if weight.name.layer in mtp_layers and weight.name.layer is not None
        for name in weight.parts.values()
        if name in specs
    }
    if not found:
        raise UsageError("--mtp drop: the checkpoint has no MTP module")
    return found


def _fitting(target: Format, own: Format) -> Format:
    """Returns the target with the scale dtype of a weight whose codes can then be moved as they are."""
    if isinstance(own, INT4) and isinstance(target, INT4):
        same_scales = replace(target, scale_dtype=own.scale_dtype)
        return same_scales if own.same_grid(same_scales) else target
    return target


def _quantization_config(
    weights: Sequence[StoredWeight],
    assigned: _Assignment,
    options: INT8Options | INT4Options,
    mtp_layers: Sequence[int],
) -> Mapping[str, Any]:
    target, rest = assigned.target, assigned.rest
    coded = assigned.selection.modules | {w.name.prefix for w in weights if assigned.is_rest(w)}
    if isinstance(target, INT8Block):
        return target.quantization_config() | {"ignored_layers": names(weights, coded)}
    unquantized = find_unquantized(weights, coded, mtp_layers)
    if isinstance(target, INT4GPTQ):
        return _gptq_config(target, patterns(unquantized, "-:"))
    if isinstance(target, INT4AWQ):
        return _awq_config(target, substrings(unquantized))
    groups: list[tuple[Format, Sequence[str]]] = [(target, ["Linear"])]
    if rest is not None:
        those = [weight for weight in weights if weight.name.prefix in coded]
        others = find_unquantized(those, assigned.selection.modules, mtp_layers)
        groups.append((rest, patterns(others, "re:")))
    activations = options.activations if isinstance(options, INT4Options) else None
    return ct.quantization_config(groups, patterns(unquantized, "re:"), activations=activations)


def _gptq_config(target: INT4GPTQ, dynamic: Sequence[str]) -> dict[str, Any]:
    """Returns GPTQModel's `quantization_config`; no algorithm is named, for none was used."""
    return {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": {pattern: {} for pattern in dynamic},
        "group_size": target.group_size,
        "lm_head": False,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": target.symmetric,
    }


def _awq_config(target: INT4AWQ, unquantized: Sequence[str]) -> dict[str, Any]:
    return {
        "bits": 4,
        "group_size": target.group_size,
        "modules_to_not_convert": list(unquantized),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
