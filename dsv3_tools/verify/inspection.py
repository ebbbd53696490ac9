"""What a checkpoint is, from its headers alone, and what is odd about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from dsv3_tools.checkpoint.architecture import differences, is_mtp_alone
from dsv3_tools.checkpoint.config import CONFIG_NAME, ModelConfig
from dsv3_tools.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME
from dsv3_tools.checkpoint.names import list_names, parse_name
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import Source, SourceLike
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import Dense, Format, FP8Block
from dsv3_tools.formats.stored import Stored, StoredWeight, find_weights, read_formats

__all__ = [
    "DTypeCount",
    "FormatCount",
    "Inspection",
    "MTPModule",
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
class MTPModule:
    """What there is of an MTP module, and whether `config.json` says the same.

    Attributes:
        layers: the layers whose weights are there.
        layout: "native", or "sglang-nextn" for one that is exported as layer 0 of a model of its own.
        alone: there is nothing of a main model beside it.
        num_tensors: its tensors.
        num_parameters: its parameters, scales not counted.
        nbytes: bytes of its tensors.
        formats: weights by format, unquantized ones included.
        shared: what it repeats of the main model: "embed_tokens", "shared_head.head".
        agrees: `config.json` counts these layers and no others.
    """

    layers: tuple[int, ...]
    layout: str
    alone: bool
    num_tensors: int
    num_parameters: int
    nbytes: int
    formats: dict[str, FormatCount]
    shared: tuple[str, ...]
    agrees: bool


@dataclass(frozen=True)
class Inspection:
    """What `dsv3 inspect` shows."""

    directory: Source
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
    mtp: MTPModule | None
    written_by_dsv3: bool
    odd: tuple[str, ...]


def inspect(directory: SourceLike) -> Inspection:
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
            directory=checkpoint.source,
            model_type=checkpoint.config.model_type,
            config=checkpoint.config,
            quantization=quantization if isinstance(quantization, dict) else None,
            num_tensors=len(checkpoint.specs),
            num_shards=len(checkpoint.shards),
            nbytes=checkpoint.nbytes,
            nbytes_on_disk=sum(shard.nbytes for shard in checkpoint.shards.values()),
            dtypes=_count_dtypes(checkpoint),
            formats=_count_formats(checkpoint, _quantized(stored)),
            parameters=_count_parameters(checkpoint, stored),
            mtp_layers=tuple(checkpoint.config.mtp_layers),
            mtp_tensors=len(mtp),
            mtp_nbytes=sum(checkpoint.specs[name].nbytes for name in mtp),
            mtp=_find_module(checkpoint, stored),
            written_by_dsv3=checkpoint.has_file(MANIFEST_NAME),
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


def _count_formats(checkpoint: Checkpoint, weights: Iterable[StoredWeight]) -> dict[str, FormatCount]:
    counts: dict[str, FormatCount] = {}
    for weight in weights:
        before = counts.get(weight.format.name, FormatCount(0, 0, 0))
        present = [checkpoint.specs[name] for name in weight.parts.values() if name in checkpoint.specs]
        counts[weight.format.name] = FormatCount(
            before.num_weights + 1,
            before.num_parameters + prod(weight.shape),
            before.nbytes + sum(spec.nbytes for spec in present),
        )
    return counts


def _find_module(checkpoint: Checkpoint, stored: Stored) -> MTPModule | None:
    """Returns the MTP module whose weights are there, counted by `config.json` or not; None without any."""
    config, end = checkpoint.config, checkpoint.config.main_layers.stop
    weights = [w for w in stored.weights if w.name.layer is not None and w.name.layer >= end]
    if not weights:
        return None
    layers = tuple(sorted({w.name.layer for w in weights if w.name.layer is not None}))
    names = [name for w in weights for name in w.parts.values() if name in checkpoint.specs]
    shared = {w.name.module for w in weights} & {"embed_tokens", "shared_head.head"}
    return MTPModule(
        layers=layers,
        layout="sglang-nextn" if config.is_nextn else "native",
        alone=len(weights) == len(stored.weights),
        num_tensors=len(names),
        num_parameters=sum(prod(weight.shape) for weight in weights),
        nbytes=sum(checkpoint.specs[name].nbytes for name in names),
        formats=_count_formats(checkpoint, weights),
        shared=tuple(sorted(shared)),
        agrees=layers == tuple(config.mtp_layers),
    )


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
    found = stored.logical | strangers
    alone = is_mtp_alone(checkpoint.config, found)
    yield from differences(checkpoint.config, found, mtp_alone=alone)
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
    _, left_behind = checkpoint.side_files()
    pickles = [name for name in left_behind if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if pickles:
        yield f"pickle files, never opened nor copied: {list_names(pickles)}"


def _index_oddities(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.has_index:
        return
    document = json.loads(checkpoint.read_file(INDEX_NAME, MAX_INDEX_BYTES))
    metadata = document.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != checkpoint.nbytes:
        shown = f"{stated:,}" if isinstance(stated, int) else str(stated)[:50]
        yield f"the index says total_size {shown}, the tensors have {checkpoint.nbytes:,} bytes"
