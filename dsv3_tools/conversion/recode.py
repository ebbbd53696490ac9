"""The planners of `convert fp8-to-bf16` and `convert bf16-to-fp8`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.architecture import differences
from dsv3_tools.checkpoint.config import CONFIG_NAME, encode_config, with_quantization
from dsv3_tools.checkpoint.dtypes import FLOAT_DTYPES
from dsv3_tools.checkpoint.names import TensorName, parse_name
from dsv3_tools.checkpoint.paths import read_small_file, side_files
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.layout import lay_out
from dsv3_tools.conversion.plan import SOURCE, Plan, SourceFile, Step, TensorRef, check_steps
from dsv3_tools.errors import CheckpointError, UsageError
from dsv3_tools.formats import Dense, FP8Block
from dsv3_tools.formats.fp8_block import LIKE_PART, SCALE_PART, SCALE_SUFFIX

__all__ = ["plan_bf16_to_fp8", "plan_fp8_to_bf16"]

MAX_SIDE_FILE_BYTES = 100_000_000
"""Tokenizers are up to 30 MB; small files are held in memory."""

LIKE = "like"
_PLAIN_PARAMETERS = frozenset({"weight", "bias", "e_score_correction_bias", "inv_freq"})


def plan_fp8_to_bf16(
    checkpoint: Checkpoint,
    *,
    max_shard_size: int | None = None,
    scale_semantics: str | None = None,
    partial: bool = False,
) -> Plan:
    """Returns the plan that dequantizes every FP8 weight to BF16 and copies everything else.

    Args:
        checkpoint: an FP8 checkpoint in the released layout.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        scale_semantics: "multiply" or "inverse", against what `config.json` says; None believes it.
        partial: the checkpoint is only a part of the model that `config.json` describes.

    Raises:
        CheckpointError: no FP8 quantization in `config.json`.
        FormatError: an FP8 quantization of another kind.
        UsageError: an unknown `scale_semantics`.
        PlanError: tensors that do not add up, all of them.
    """
    fp8 = _fp8_format(checkpoint)
    if scale_semantics not in (None, "multiply", "inverse"):
        raise UsageError(f"scale_semantics: got {scale_semantics!r}, expected 'multiply' or 'inverse'")
    if scale_semantics is not None:
        fp8 = replace(fp8, inverse_scales=scale_semantics == "inverse")
    steps: list[Step] = []
    refused: dict[str, str] = {}
    for name, spec in checkpoint.specs.items():
        parsed = parse_name(name)
        if parsed is None:
            refused[name] = "is not a tensor of this family"
        elif parsed.parameter == SCALE_PART:
            refused |= _orphan(name, parsed, checkpoint)
        elif spec.dtype == "F8_E4M3" and parsed.parameter == "weight":
            steps.append(_dequantize(parsed, name, spec, fp8))
        elif parsed.parameter not in _PLAIN_PARAMETERS or spec.dtype not in FLOAT_DTYPES:
            refused[name] = f"({spec}) is neither an FP8 weight nor an unquantized tensor"
        else:
            steps.append(Step.copy(name, spec))
    _check(checkpoint, steps, refused, partial=partial)
    if all(step.is_copy for step in steps):
        raise CheckpointError(f"{checkpoint.directory}: no tensor is F8_E4M3, there is nothing to convert")
    options = {
        "scale_semantics": "inverse" if fp8.inverse_scales else "multiply",
    }
    return _finish(checkpoint, "fp8-to-bf16", options, steps, None, max_shard_size)


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
            f"{checkpoint.directory / CONFIG_NAME}: has a quantization_config, expected an unquantized model"
        )
    fp8 = _target_format(scale_fmt, like)
    steps: list[Step] = []
    refused: dict[str, str] = {}
    for name, spec in checkpoint.specs.items():
        parsed = parse_name(name)
        if parsed is None:
            refused[name] = "is not a tensor of this family"
        elif parsed.parameter not in _PLAIN_PARAMETERS or spec.dtype not in FLOAT_DTYPES:
            refused[name] = f"({spec}) is not an unquantized tensor"
        elif unlike := _unlike(name, spec, like):
            refused[name] = unlike
        elif _becomes_fp8(parsed, name, like) and spec.dtype not in FP8Block.encodes:
            refused[name] = f"({spec}) cannot be quantized, expected {' or '.join(sorted(FP8Block.encodes))}"
        elif _becomes_fp8(parsed, name, like):
            steps.append(_quantize(parsed, name, spec, fp8, like))
        else:
            steps.append(Step.copy(name, spec))
    _check(checkpoint, steps, refused, like, partial=partial)
    if all(step.is_copy for step in steps):
        raise CheckpointError(f"{checkpoint.directory}: no tensor is a linear that FP8 checkpoints quantize")
    config = fp8.quantization_config()
    if like is not None:
        config = dict(like.config_json["quantization_config"])
    return _finish(
        checkpoint, "bf16-to-fp8", {"scale_fmt": fp8.scale_fmt}, steps, config, max_shard_size, like=like
    )


def _fp8_format(checkpoint: Checkpoint) -> FP8Block:
    """Returns the FP8 format that the checkpoint's `config.json` states.

    Raises:
        CheckpointError: it states none.
        FormatError: it states another quantization.
    """
    where = str(checkpoint.directory / CONFIG_NAME)
    config = checkpoint.config_json.get("quantization_config")
    if not isinstance(config, dict):
        expected = FP8Block().quantization_config()
        raise CheckpointError(
            f"{where}: no quantization_config, expected one like {expected}; "
            "a checkpoint whose weights are FP8 must say with which blocks"
        )
    return FP8Block.from_quantization_config(config, where)


def _target_format(scale_fmt: str | None, like: Checkpoint | None) -> FP8Block:
    if like is None:
        return FP8Block(scale_fmt=scale_fmt or "f32")
    fmt = _fp8_format(like)
    if fmt.inverse_scales:
        raise CheckpointError(f"{like.directory}: stores reciprocal scales, which --like cannot take over")
    if scale_fmt not in (None, fmt.scale_fmt):
        raise UsageError(
            f"--scale-fmt {scale_fmt}: {like.directory} has {fmt.scale_fmt} scales; leave one of them out"
        )
    return fmt


def _becomes_fp8(parsed: TensorName, name: str, like: Checkpoint | None) -> bool:
    if like is not None:
        original = like.specs.get(name)
        return original is not None and original.dtype == "F8_E4M3"
    return parsed.is_fp8_linear and parsed.parameter == "weight"


def _unlike(name: str, spec: TensorSpec, like: Checkpoint | None) -> str | None:
    """Returns how a tensor differs from the checkpoint that it is said to come from."""
    if like is None:
        return None
    original = like.specs.get(name)
    if original is None:
        return f"is not in {like.directory}"
    if original.shape != spec.shape:
        return f"is {spec}, in {like.directory} it is {original}"
    return None


def _dequantize(parsed: TensorName, name: str, spec: TensorSpec, fp8: FP8Block) -> Step:
    inputs = {"weight": TensorRef(name), SCALE_PART: TensorRef(f"{parsed.prefix}.{SCALE_PART}")}
    return Step(spec.shape, inputs, {"weight": name}, fp8, Dense("BF16"), spec.dtype)


def _quantize(
    parsed: TensorName, name: str, spec: TensorSpec, fp8: FP8Block, like: Checkpoint | None
) -> Step:
    scale = f"{parsed.prefix}.{SCALE_PART}"
    inputs = {"weight": TensorRef(name)}
    if like is not None:
        inputs[LIKE_PART] = TensorRef(scale, LIKE)
    outputs = {"weight": name, SCALE_PART: scale}
    return Step(spec.shape, inputs, outputs, Dense(spec.dtype), fp8, spec.dtype)


def _orphan(name: str, parsed: TensorName, checkpoint: Checkpoint) -> dict[str, str]:
    """Returns what is wrong with a scale that has no FP8 weight beside it."""
    spec = checkpoint.specs.get(f"{parsed.prefix}.weight")
    if spec is None:
        return {name: "is there but its weight is missing"}
    if spec.dtype != "F8_E4M3":
        return {name: f"is there but its weight is {spec}, expected F8_E4M3"}
    return {}


def _check(
    checkpoint: Checkpoint,
    steps: list[Step],
    refused: Mapping[str, str],
    like: Checkpoint | None = None,
    *,
    partial: bool,
) -> None:
    """Refuses, in one message, whatever does not add up."""
    origins = _origins(checkpoint, like)
    known = {name: spec for name, spec in checkpoint.specs.items() if parse_name(name) is not None}
    incomplete = [] if partial else list(differences(checkpoint.config, known, SCALE_SUFFIX))
    if incomplete:
        incomplete[-1] += " (--partial converts what is there)"
    check_steps(
        str(checkpoint.directory),
        {origin: other.specs for origin, other in origins.items()},
        steps,
        dropped={},
        refused=refused,
        others=incomplete,
    )


def _origins(checkpoint: Checkpoint, like: Checkpoint | None) -> dict[str, Checkpoint]:
    return {SOURCE: checkpoint} | ({LIKE: like} if like is not None else {})


def _finish(
    checkpoint: Checkpoint,
    operation: str,
    options: Mapping[str, Any],
    steps: list[Step],
    quantization_config: Mapping[str, Any] | None,
    max_shard_size: int | None,
    *,
    like: Checkpoint | None = None,
) -> Plan:
    travel, stay = side_files(checkpoint.directory, checkpoint.shards)
    return Plan(
        operation=operation,
        options=dict(options) | {"max_shard_size": max_shard_size, "like": like is not None},
        shards=lay_out(checkpoint, steps, max_shard_size),
        dropped={},
        config=encode_config(with_quantization(checkpoint.config_json, quantization_config)),
        side_files=tuple(travel),
        left_behind=tuple(stay),
        source_files=_source_files(_origins(checkpoint, like), travel),
        nbytes_in=checkpoint.nbytes,
    )


def _source_files(checkpoints: Mapping[str, Checkpoint], travel: list[str]) -> tuple[SourceFile, ...]:
    files = [
        SourceFile(origin, shard.name, shard.nbytes, shard.mtime_ns, shard.ctime_ns, shard.header_sha256)
        for origin, checkpoint in checkpoints.items()
        for shard in checkpoint.shards.values()
    ]
    directory = checkpoints[SOURCE].directory
    files += [_small_file(directory, name) for name in (CONFIG_NAME, *travel)]
    return tuple(files)


def _small_file(directory: Path, name: str) -> SourceFile:
    """Returns a file that is known by its content alone: touching it changes nothing."""
    data = read_small_file(directory, name, MAX_SIDE_FILE_BYTES)
    return SourceFile(SOURCE, name, len(data), 0, 0, hashlib.sha256(data).hexdigest())
