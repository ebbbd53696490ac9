"""What a checkpoint is, from its headers alone, and what is odd about it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
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
from dsv3_tools.formats.fp8_block import SCALE_SUFFIX, FP8Block

__all__ = ["DTypeCount", "Inspection", "Parameters", "inspect"]


@dataclass(frozen=True)
class DTypeCount:
    """Tensors of one element type."""

    num_tensors: int
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
            parameters=_count_parameters(checkpoint),
            mtp_layers=tuple(checkpoint.config.mtp_layers),
            mtp_tensors=len(mtp),
            mtp_nbytes=sum(checkpoint.specs[name].nbytes for name in mtp),
            written_by_dsv3=(checkpoint.directory / MANIFEST_NAME).exists(),
            odd=tuple(_oddities(checkpoint)),
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


def _count_parameters(checkpoint: Checkpoint) -> Parameters:
    config = checkpoint.config
    shared = routed = mtp = 0
    for name, spec in checkpoint.specs.items():
        parsed = parse_name(name)
        if name.endswith(SCALE_SUFFIX) or parsed is None:
            continue
        if parsed.layer is not None and parsed.layer in config.mtp_layers:
            mtp += spec.num_elements
        elif parsed.is_routed_expert:
            routed += spec.num_elements
        else:
            shared += spec.num_elements
    active = shared + routed * config.num_experts_per_tok // config.n_routed_experts
    return Parameters(shared + routed, active, routed, mtp)


def _oddities(checkpoint: Checkpoint) -> Iterator[str]:
    """Yields what a user should know before relying on the checkpoint."""
    yield from differences(checkpoint.config, checkpoint.specs, SCALE_SUFFIX)
    yield from _quantization_oddities(checkpoint)
    yield from _index_oddities(checkpoint)
    _, left_behind = side_files(checkpoint.directory, checkpoint.shards)
    pickles = [name for name in left_behind if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if pickles:
        yield f"pickle files, never opened nor copied: {list_names(pickles)}"


def _quantization_oddities(checkpoint: Checkpoint) -> Iterator[str]:
    has_fp8 = any(spec.dtype.startswith("F8_") for spec in checkpoint.specs.values())
    has_key = "quantization_config" in checkpoint.config_json
    if has_fp8 and not has_key:
        yield "weights are FP8, but config.json has no quantization_config: engines would read raw codes"
    elif has_fp8:
        try:
            FP8Block.from_quantization_config(
                checkpoint.config_json["quantization_config"] or {}, CONFIG_NAME
            )
        except FormatError as error:
            yield str(error)
    scales = [name for name in checkpoint.specs if name.endswith(SCALE_SUFFIX)]
    fp8 = {name for name, spec in checkpoint.specs.items() if spec.dtype == "F8_E4M3"}
    if unscaled := sorted(name for name in fp8 if name + SCALE_SUFFIX not in checkpoint.specs):
        yield f"{len(unscaled)} FP8 weights have no scale: {list_names(unscaled)}"
    if orphans := sorted(name for name in scales if name.removesuffix(SCALE_SUFFIX) not in fp8):
        yield f"{len(orphans)} scales belong to no FP8 weight: {list_names(orphans)}"
    has_integers = any(spec.dtype[0] in "IU" for spec in checkpoint.specs.values())
    if has_key and not has_fp8 and not has_integers and not scales:
        yield "no weight is quantized, but config.json has a quantization_config: vLLM would output NaN"
    apart = [
        name
        for name in scales
        if checkpoint.weight_map.get(name.removesuffix(SCALE_SUFFIX))
        not in (None, checkpoint.weight_map[name])
    ]
    if apart:
        yield f"{len(apart)} scales are in another shard than their weight: {list_names(sorted(apart))}"
    biases = [name for name in checkpoint.specs if name.endswith("e_score_correction_bias")]
    if rounded := [name for name in biases if checkpoint.specs[name].dtype != "F32"]:
        yield f"{len(rounded)} router biases are not float32: routing changes; {list_names(sorted(rounded))}"


def _index_oddities(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.has_index:
        return
    document = json.loads((checkpoint.directory / INDEX_NAME).read_bytes())
    metadata = document.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != checkpoint.nbytes:
        shown = f"{stated:,}" if isinstance(stated, int) else str(stated)[:50]
        yield f"the index says total_size {shown}, the tensors have {checkpoint.nbytes:,} bytes"
