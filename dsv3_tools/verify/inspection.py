"""What a checkpoint is, from its headers alone, and what is odd about it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.architecture import differences
from dsv3_tools.checkpoint.config import CONFIG_NAME, ModelConfig
from dsv3_tools.checkpoint.index import INDEX_NAME
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME
from dsv3_tools.checkpoint.names import list_names, parse_name
from dsv3_tools.checkpoint.paths import side_files
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import Dense, Format, FP8Block
from dsv3_tools.formats.stored import Stored, StoredWeight, find_weights, read_formats

__all__ = [
    "DTypeCount",
    "FormatCount",
    "Inspection",
    "Parameters",
    "flaws",
    "inspect",
    "read_what_is_stored",
    "remarks",
]


@dataclass(frozen=True)
class DTypeCount:
    """Tensors of one element type."""

    num_tensors: int
    nbytes: int


@dataclass(frozen=True)
class FormatCount:
    """Quantized weights in one format; `nbytes` counts their scales and other parts, too."""

    num_weights: int
    num_parameters: int
    nbytes: int


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, scales not counted.

    `total` is the model without its MTP module; `active` what one token uses of it, embeddings
    counted; `routed` all routed experts; `mtp` the MTP module.
    """

    total: int
    active: int
    routed: int
    mtp: int


@dataclass(frozen=True)
class Inspection:
    """What `dsv3 inspect` shows."""

    directory: Path
    model_type: str
    config: ModelConfig
    quantization: dict[str, Any] | None
    num_tensors: int
    num_shards: int
    nbytes: int
    nbytes_on_disk: int
    dtypes: dict[str, DTypeCount]
    formats: dict[str, FormatCount]
    parameters: Parameters
    mtp_layers: tuple[int, ...]
    mtp_tensors: int
    mtp_nbytes: int
    written_by_dsv3: bool
    odd: tuple[str, ...]


def inspect(directory: str | os.PathLike[str]) -> Inspection:
    """Returns what a checkpoint is, from `config.json`, index and headers; torch is not needed.

    Example:
        >>> inspect("miniature/checkpoint").model_type
        'deepseek_v3'

    Raises:
        CheckpointError: not a checkpoint of the family, or one whose files do not agree.
    """
    with Checkpoint(directory) as checkpoint:
        stored, problem = read_what_is_stored(checkpoint)
        mtp = [name for name in checkpoint.specs if _layer(name) in checkpoint.config.mtp_layers]
        quantization = checkpoint.config_json.get("quantization_config")
        return Inspection(
            directory=checkpoint.directory,
            model_type=checkpoint.config.model_type,
            config=checkpoint.config,
            quantization=quantization if isinstance(quantization, dict) else None,
            num_tensors=len(checkpoint.specs),
            num_shards=len(checkpoint.shards),
            nbytes=checkpoint.nbytes,
            nbytes_on_disk=sum(shard.nbytes for shard in checkpoint.shards.values()),
            dtypes=_count_dtypes(checkpoint),
            formats=_count_formats(checkpoint, stored),
            parameters=_count_parameters(checkpoint, stored),
            mtp_layers=tuple(checkpoint.config.mtp_layers),
            mtp_tensors=len(mtp),
            mtp_nbytes=sum(checkpoint.specs[name].nbytes for name in mtp),
            written_by_dsv3=(checkpoint.directory / MANIFEST_NAME).exists(),
            odd=(*flaws(checkpoint, stored, problem), *remarks(checkpoint, stored)),
        )


def _layer(name: str) -> int | None:
    parsed = parse_name(name)
    return None if parsed is None else parsed.layer


def _count_dtypes(checkpoint: Checkpoint) -> dict[str, DTypeCount]:
    counts: dict[str, DTypeCount] = {}
    for spec in checkpoint.specs.values():
        before = counts.get(spec.dtype, DTypeCount(0, 0))
        counts[spec.dtype] = DTypeCount(before.num_tensors + 1, before.nbytes + spec.nbytes)
    return dict(sorted(counts.items(), key=lambda item: -item[1].nbytes))


def read_what_is_stored(checkpoint: Checkpoint) -> tuple[Stored, str | None]:
    """Returns what is stored, and what is wrong with what `config.json` says of it."""
    formats: tuple[Format, ...] = (FP8Block(),)
    has_fp8 = any(spec.dtype.startswith("F8_") for spec in checkpoint.specs.values())
    problem = None
    if has_fp8 and "quantization_config" not in checkpoint.config_json:
        problem = "weights are FP8, but config.json has no quantization_config: engines would read raw codes"
    else:
        try:
            formats = read_formats(checkpoint.config_json, CONFIG_NAME)
        except FormatError as error:
            problem = str(error)
    return find_weights(checkpoint.specs, formats), problem


def _count_formats(checkpoint: Checkpoint, stored: Stored) -> dict[str, FormatCount]:
    counts: dict[str, FormatCount] = {}
    for weight in _quantized(stored):
        before = counts.get(weight.format.name, FormatCount(0, 0, 0))
        present = [checkpoint.specs[name] for name in weight.parts.values() if name in checkpoint.specs]
        counts[weight.format.name] = FormatCount(
            before.num_weights + 1,
            before.num_parameters + prod(weight.shape),
            before.nbytes + sum(spec.nbytes for spec in present),
        )
    return counts


def _quantized(stored: Stored) -> Iterator[StoredWeight]:
    return (weight for weight in stored.weights if not isinstance(weight.format, Dense))


def _count_parameters(checkpoint: Checkpoint, stored: Stored) -> Parameters:
    config = checkpoint.config
    shared = routed = mtp = 0
    for weight in stored.weights:
        if weight.name.layer is not None and weight.name.layer in config.mtp_layers:
            mtp += prod(weight.shape)
        elif weight.name.is_routed_expert:
            routed += prod(weight.shape)
        else:
            shared += prod(weight.shape)
    active = shared + routed * config.num_experts_per_tok // config.n_routed_experts
    return Parameters(shared + routed, active, routed, mtp)


def flaws(checkpoint: Checkpoint, stored: Stored, problem: str | None) -> Iterator[str]:
    """Yields what an engine would refuse or misread."""
    strangers = {name: checkpoint.specs[name] for name in stored.refused if parse_name(name) is None}
    yield from differences(checkpoint.config, stored.logical | strangers)
    if problem is not None:
        yield problem
    quantized, specs = list(_quantized(stored)), checkpoint.specs
    if "quantization_config" in checkpoint.config_json and not quantized and not stored.refused:
        yield "no weight is quantized, but config.json has a quantization_config: vLLM would output NaN"
    if lacking := sorted(w.code_name for w in quantized if any(n not in specs for n in w.parts.values())):
        yield f"{len(lacking)} quantized weights have no scale or lack another part: {list_names(lacking)}"
    if names := sorted(name for name in stored.refused if parse_name(name) is not None):
        others = f" and {len(names) - 1} more: {list_names(names[1:])}" if names[1:] else ""
        yield f"{names[0]} {stored.refused[names[0]]}{others}"
    biases = [name for name in specs if name.endswith("e_score_correction_bias")]
    if rounded := [name for name in biases if specs[name].dtype != "F32"]:
        yield f"{len(rounded)} router biases are not float32: routing changes; {list_names(sorted(rounded))}"


def remarks(checkpoint: Checkpoint, stored: Stored) -> Iterator[str]:
    """Yields what is odd, but does no harm."""
    homes = checkpoint.weight_map
    apart = [
        name
        for weight in _quantized(stored)
        for name in weight.parts.values()
        if homes.get(name, homes[weight.code_name]) != homes[weight.code_name]
    ]
    if apart:
        yield (
            f"{len(apart)} parts of weights, such as scales, are in another shard than the codes: "
            f"{list_names(sorted(apart))}"
        )
    yield from _index_oddities(checkpoint)
    _, left_behind = side_files(checkpoint.directory, checkpoint.shards)
    pickles = [name for name in left_behind if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if pickles:
        yield f"pickle files, never opened nor copied: {list_names(pickles)}"


def _index_oddities(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.has_index:
        return
    document = json.loads((checkpoint.directory / INDEX_NAME).read_bytes())
    metadata = document.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != checkpoint.nbytes:
        shown = f"{stated:,}" if isinstance(stated, int) else str(stated)[:50]
        yield f"the index says total_size {shown}, the tensors have {checkpoint.nbytes:,} bytes"
