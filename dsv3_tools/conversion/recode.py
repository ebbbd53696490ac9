"""The planners of `convert`: to BF16 from whatever is quantized, and from BF16 to FP8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dsv3_tools.checkpoint.config import CONFIG_NAME, with_quantization
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.plan import Plan, Step, TensorRef
from dsv3_tools.conversion.planning import (
    LIKE,
    check_plan,
    finish_plan,
    recode_step,
    require_work,
)
from dsv3_tools.errors import CheckpointError, UsageError
from dsv3_tools.formats import INT4, Dense, Format, FP8Block, INT8Block, INT8Channel
from dsv3_tools.formats.fp8_block import LIKE_PART, SCALE_PART
from dsv3_tools.formats.stored import StoredWeight, find_weights, read_formats

__all__ = ["plan_bf16_to_fp8", "plan_fp8_to_bf16", "plan_int4_to_bf16", "plan_int8_to_bf16"]

_FAMILIES: dict[str, tuple[type[Format], ...]] = {
    "fp8-to-bf16": (FP8Block,),
    "int8-to-bf16": (INT8Block, INT8Channel),
    "int4-to-bf16": (INT4,),
}
"""The formats that a command is for. It decodes whatever else is quantized beside them, too."""


def plan_fp8_to_bf16(
    checkpoint: Checkpoint,
    *,
    max_shard_size: int | None = None,
    scale_semantics: str | None = None,
    partial: bool = False,
) -> Plan:
    """Returns the plan that dequantizes every quantized weight to BF16 and copies everything else.

    Args:
        checkpoint: an FP8 checkpoint in the released layout, or in that of compressed-tensors.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        scale_semantics: "multiply" or "inverse", against what `config.json` says; None believes it.
        partial: the checkpoint is only a part of the model that `config.json` describes.

    Raises:
        CheckpointError: no FP8 quantization in `config.json`.
        FormatError: an FP8 quantization of another kind.
        UsageError: an unknown `scale_semantics`.
        PlanError: tensors that do not add up, all of them.
    """
    if scale_semantics not in (None, "multiply", "inverse"):
        raise UsageError(f"scale_semantics: got {scale_semantics!r}, expected 'multiply' or 'inverse'")
    return _plan_to_bf16(checkpoint, "fp8-to-bf16", max_shard_size, scale_semantics, partial=partial)


def plan_int8_to_bf16(
    checkpoint: Checkpoint, *, max_shard_size: int | None = None, partial: bool = False
) -> Plan:
    """Returns the plan that dequantizes an INT8 checkpoint; see `plan_fp8_to_bf16`.

    Raises:
        CheckpointError: no INT8 quantization in `config.json`.
        FormatError: an INT8 quantization that is not known here.
        PlanError: tensors that do not add up, all of them.
    """
    return _plan_to_bf16(checkpoint, "int8-to-bf16", max_shard_size, partial=partial)


def plan_int4_to_bf16(
    checkpoint: Checkpoint, *, max_shard_size: int | None = None, partial: bool = False
) -> Plan:
    """Returns the plan that dequantizes an INT4 checkpoint; see `plan_fp8_to_bf16`.

    Raises:
        CheckpointError: no INT4 quantization in `config.json`.
        FormatError: an INT4 quantization that is not known here.
        PlanError: tensors that do not add up, all of them.
    """
    return _plan_to_bf16(checkpoint, "int4-to-bf16", max_shard_size, partial=partial)


def plan_bf16_to_fp8(
    checkpoint: Checkpoint,
    *,
    scale_fmt: str | None = None,
    like: Checkpoint | None = None,
    max_shard_size: int | None = None,
    partial: bool = False,
) -> Plan:
    """Returns the plan that quantizes to FP8 what the release stores in FP8, and copies everything else.

    Args:
        checkpoint: an unquantized checkpoint (BF16; F16 and F32 masters work too).
        scale_fmt: "f32" or "ue8m0"; None takes that of `like`, or "f32".
        like: the FP8 checkpoint that this one was dequantized from. What it stores in FP8 is
            quantized, and blocks that did not change keep their scales and so their bytes.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the checkpoint is only a part of the model that `config.json` describes.

    Raises:
        CheckpointError: the source is quantized already, or `like` is no FP8 checkpoint.
        UsageError: `scale_fmt` contradicts `like`.
        PlanError: tensors that do not add up, all of them.
    """
    if "quantization_config" in checkpoint.config_json:
        raise CheckpointError(
            f"{checkpoint.where(CONFIG_NAME)}: has a quantization_config, expected an unquantized model"
        )
    fp8 = _target_format(scale_fmt, like)
    stored = find_weights(checkpoint.specs, ())
    steps: list[Step] = []
    refused: dict[str, str] = {}
    for weight in stored.weights:
        name, spec = weight.full_name, checkpoint.specs[weight.full_name]
        becomes_fp8 = _becomes_fp8(weight, like)
        if unlike := _unlike(name, spec, like):
            refused[name] = unlike
        elif becomes_fp8 and spec.dtype not in FP8Block.encodes:
            refused[name] = f"({spec}) cannot be quantized, expected {' or '.join(sorted(FP8Block.encodes))}"
        elif becomes_fp8:
            steps.append(_quantize(weight, fp8, like))
        else:
            steps.append(Step.copy(name, spec))
    check_plan(checkpoint, stored, steps, partial=partial, refused=refused, like=like)
    require_work(checkpoint, steps, "no tensor is a linear that FP8 checkpoints quantize")
    config = fp8.quantization_config()
    if like is not None:
        config = dict(like.config_json["quantization_config"])
    edited = with_quantization(checkpoint.config_json, config)
    options = {"scale_fmt": fp8.scale_fmt}
    return finish_plan(checkpoint, "bf16-to-fp8", options, steps, edited, max_shard_size, like=like)


def _plan_to_bf16(
    checkpoint: Checkpoint,
    operation: str,
    max_shard_size: int | None,
    scale_semantics: str | None = None,
    *,
    partial: bool,
) -> Plan:
    formats = _stated_formats(checkpoint, operation)
    if scale_semantics is not None:
        formats = [
            replace(fmt, inverse_scales=scale_semantics == "inverse") if isinstance(fmt, FP8Block) else fmt
            for fmt in formats
        ]
    stored = find_weights(checkpoint.specs, formats)
    steps = [
        recode_step(weight, weight.format if isinstance(weight.format, Dense) else Dense("BF16"))
        for weight in stored.weights
    ]
    check_plan(checkpoint, stored, steps, partial=partial)
    kind = operation.partition("-")[0].upper()
    require_work(checkpoint, steps, f"no weight is {kind}, there is nothing to convert")
    inverse = any(isinstance(fmt, FP8Block) and fmt.inverse_scales for fmt in formats)
    options = {"scale_semantics": "inverse" if inverse else "multiply"}
    edited = with_quantization(checkpoint.config_json, None)
    return finish_plan(checkpoint, operation, options, steps, edited, max_shard_size)


def _stated_formats(checkpoint: Checkpoint, operation: str) -> Sequence[Format]:
    """Returns the formats that the checkpoint's `config.json` states.

    Raises:
        CheckpointError: it states none that `operation` is for.
        FormatError: it states another quantization.
    """
    where = checkpoint.where(CONFIG_NAME)
    if not isinstance(checkpoint.config_json.get("quantization_config"), dict):
        example = f" like {FP8Block().quantization_config()}" if operation == "fp8-to-bf16" else ""
        raise CheckpointError(
            f"{where}: no quantization_config, expected one{example}; a checkpoint whose weights are "
            "quantized must say how"
        )
    formats = read_formats(checkpoint.config_json, where)
    if not any(isinstance(fmt, _FAMILIES[operation]) for fmt in formats):
        other = next(name for name, kinds in _FAMILIES.items() if isinstance(formats[0], kinds))
        raise CheckpointError(
            f"{where}: says that weights are {formats[0].name}, which is not for {operation}; use "
            f"dsv3 convert {other}"
        )
    return formats


def _target_format(scale_fmt: str | None, like: Checkpoint | None) -> FP8Block:
    if like is None:
        return FP8Block(scale_fmt=scale_fmt or "f32")
    fmt = _stated_formats(like, "fp8-to-bf16")[0]
    if not isinstance(fmt, FP8Block) or fmt.scale_part != SCALE_PART:
        raise CheckpointError(f"{like.source}: is not in the released FP8 layout, which --like asks for")
    if fmt.inverse_scales:
        raise CheckpointError(f"{like.source}: stores reciprocal scales, which --like cannot take over")
    if scale_fmt not in (None, fmt.scale_fmt):
        raise UsageError(
            f"--scale-fmt {scale_fmt}: {like.source} has {fmt.scale_fmt} scales; leave one of them out"
        )
    return fmt


def _becomes_fp8(weight: StoredWeight, like: Checkpoint | None) -> bool:
    if like is not None:
        original = like.specs.get(weight.full_name)
        return original is not None and original.dtype == "F8_E4M3"
    return weight.name.is_fp8_linear and weight.name.parameter == "weight"


def _unlike(name: str, spec: TensorSpec, like: Checkpoint | None) -> str | None:
    """Returns how a tensor differs from the checkpoint that it is said to come from."""
    if like is None:
        return None
    original = like.specs.get(name)
    if original is None:
        return f"is not in {like.source}"
    if original.shape != spec.shape:
        return f"is {spec}, in {like.source} it is {original}"
    return None


def _quantize(weight: StoredWeight, fp8: FP8Block, like: Checkpoint | None) -> Step:
    step = recode_step(weight, fp8)
    if like is None:
        return step
    earlier = TensorRef(f"{weight.name.prefix}.{SCALE_PART}", LIKE)
    return replace(step, inputs={**step.inputs, LIKE_PART: earlier})
