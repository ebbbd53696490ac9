"""Do two checkpoints predict the same? Both run over the same tokens in lockstep, their logits compared."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import SourceLike
from dsv3_tools.conversion.devices import resolve_devices
from dsv3_tools.conversion.progress import Meter, Progress, Stop
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.errors import UsageError, VerificationFailed
from dsv3_tools.formats import Dense, Format
from dsv3_tools.formats.stored import find_weights, read_formats
from dsv3_tools.model.settings import Settings
from dsv3_tools.model.tokenizer import TOKENIZER_FILES
from dsv3_tools.model.tokens import read_tokens
from dsv3_tools.verify.calibration import calibration_sha256, seen_before
from dsv3_tools.verify.devices import COMPUTE_DTYPES, default_dtype, run_on
from dsv3_tools.verify.expectations import label
from dsv3_tools.verify.logits_limits import Lossy, choose_preset, missed, places, with_limits
from dsv3_tools.verify.logits_results import Divergence, LogitsReport, Thresholds
from dsv3_tools.verify.logits_run import Findings, HeadFindings, Request, compare_models
from dsv3_tools.verify.logits_summary import heat_map, worst_tokens
from dsv3_tools.verify.metrics import COLUMNS, divergence, histogram, perplexity

__all__ = ["verify_logits"]


def verify_logits(
    reference: SourceLike,
    candidate: SourceLike,
    *,
    tokens: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    baseline: bool = True,
    preset: str | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    min_top5: float | None = None,
    max_logit_error: float | None = None,
    max_free_kl: float | None = None,
    max_perplexity_rise: float | None = None,
    max_block_error: float | None = None,
    max_expert_error: float | None = None,
    max_router_error: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
) -> LogitsReport:
    """Runs two checkpoints over the same tokens and compares what they predict.

    Both may be in any format; weights are decoded to BF16, so that a checkpoint and its conversion to BF16
    give the same logits bit for bit. Weights are read one layer at a time, and once.

    Example:
        >>> model = "miniature/checkpoint"
        >>> report = verify_logits(model, model, device="cpu", length=64, max_tokens=128)
        >>> report.passed, report.runs["free"].kl
        (True, 0.0)

    Args:
        reference: the checkpoint that is right.
        candidate: the one that is to be the same model.
        tokens: `.npy` or `.safetensors` file of token ids, `[tokens]` or `[sequences, tokens]`.
        text: UTF-8 file, for the reference's tokenizer; without either, a text that comes along.
        length: tokens of a sequence; None is 512, or whole rows of `tokens`.
        max_tokens: of all sequences; None is all that there are.
        device: "auto", "cpu", "cuda", or "cuda:0,1"; several are ranks that share heads and experts.
        dtype: type of arithmetic, "F32" or "BF16"; None is BF16 on GPUs and F32 on a CPU.
        baseline: run the reference in the other type, too: what rounding alone does.
        preset: limits by kind of conversion, see `PRESETS`; None goes by the formats.
        max_kl: and the following, in place of the preset's limits: see `Thresholds`.
        min_top1: as there.
        min_top5: as there.
        max_logit_error: as there.
        max_free_kl: as there.
        max_perplexity_rise: as there.
        max_block_error: as there.
        max_expert_error: as there.
        max_router_error: as there.
        on_progress: called after every layer.
        stop: lets a signal handler end it.

    Returns:
        The findings; limits that were missed are findings, not exceptions.

    Raises:
        UsageError: options that contradict each other or make no sense.
        CheckpointError: not a checkpoint of the family, or tokens that the model does not have.
        VerificationFailed: the two have different dimensions.
    """
    began = time.monotonic()
    stop = stop or Stop()
    limits = {
        "max_kl": max_kl,
        "min_top1": min_top1,
        "min_top5": min_top5,
        "max_logit_error": max_logit_error,
        "max_free_kl": max_free_kl,
        "max_perplexity_rise": max_perplexity_rise,
        "max_block_error": max_block_error,
        "max_expert_error": max_expert_error,
        "max_router_error": max_router_error,
    }
    with Checkpoint(reference) as ours, Checkpoint(candidate) as theirs:
        stored = _stored(ours), _stored(theirs)
        formats = _formats(stored[0]), _formats(stored[1])
        lossy = _lossy_blocks(*stored)
        missing = tuple(_missing_mtp(theirs, stored[1]))
        thresholds = with_limits(preset or choose_preset(*formats), limits)
        differences = _compare_settings(ours, theirs)
        given = read_tokens(
            ours.folder_of(TOKENIZER_FILES),
            tokens=None if tokens is None else Path(tokens),
            text=None if text is None else Path(text),
            length=length,
            max_tokens=max_tokens,
            vocab_size=ours.config.vocab_size,
        )
        layer_nbytes = _layer_nbytes(ours, theirs)
        calibration = [calibration_sha256(one) for one in (ours, theirs)]
    ranks = Ranks.join()
    devices = resolve_devices(device, ranks)
    dtype = dtype or default_dtype(devices)
    if dtype not in COMPUTE_DTYPES:
        raise UsageError(f"--dtype {dtype}: expected {' or '.join(COMPUTE_DTYPES)}")
    request = Request(ours.source, theirs.source, given.batch_BL, dtype, baseline)
    meter = Meter(sum(layer_nbytes.values()), len(layer_nbytes), on_progress)

    def report_layer(number: object) -> None:
        assert isinstance(number, int)
        meter.add(layer_nbytes.get(number, 0), shards=1)

    found = run_on(devices, compare_models, request, report_layer, stop)
    runs = _divergences(found.main)
    reference_perplexity = _perplexity(found.main)
    ends = {"embedding": found.embedding, "head": found.main.error}
    return LogitsReport(
        reference=ours.source,
        candidate=theirs.source,
        tokens=given.source,
        num_sequences=given.batch_BL.shape[0],
        length=given.batch_BL.shape[1],
        devices=tuple(devices * ranks.world_size),
        dtype=dtype,
        formats=formats,
        perplexity=reference_perplexity,
        runs=runs,
        mtp=tuple(_divergences(head) for head in found.mtp),
        layers=tuple(found.layers),
        worst=worst_tokens(found.main, given),
        histogram=histogram({run: table[:, COLUMNS.index("kl")] for run, table in found.main.tables.items()}),
        heat=heat_map(found.errors),
        thresholds=thresholds,
        problems=(
            *differences,
            *missing,
            *places(thresholds, found.layers, lossy, **ends),
            *missed(thresholds, runs, reference_perplexity),
        ),
        notes=(
            *_notes(found, given.batch_BL.numel(), thresholds, formats),
            *seen_before(given.batch_BL, calibration),
        ),
        seconds=time.monotonic() - began,
        nbytes=sum(layer_nbytes.values()),
        **ends,
    )


def _compare_settings(ours: Checkpoint, theirs: Checkpoint) -> tuple[str, ...]:
    """Returns what the two `config.json` say differently about the forward pass.

    Raises:
        VerificationFailed: a dimension differs, so that hidden states cannot be compared.
    """
    one, other = (Settings.from_json(c.config_json, c.where(CONFIG_NAME)) for c in (ours, theirs))
    dims = [
        f"{name} is {theirs_value}, the reference has {ours_value}"
        for name, ours_value, theirs_value in _differing(one.dims, other.dims)
        if name not in _MAY_DIFFER
    ]
    if dims:
        raise VerificationFailed(
            f"{theirs.where(CONFIG_NAME)}: another architecture than {ours.source}: {'; '.join(dims)}"
        )
    return tuple(
        f"{CONFIG_NAME}: {name} is {theirs_value}, the reference has {ours_value}"
        for name, ours_value, theirs_value in _differing(one, other)
        if not name.startswith("dims.")
    )


_FEW_ROUTES = 32
_MAY_DIFFER = {"model_type", "num_nextn_predict_layers", "tie_word_embeddings"}


def _differing(one: object, other: object) -> Iterator[tuple[str, Any, Any]]:
    """Yields the fields in which two dataclasses differ, with both values."""
    for field in dataclasses.fields(one):  # type: ignore[arg-type]
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if ours == theirs:
            continue
        if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
            for name, *values in _differing(ours, theirs):
                yield f"{field.name}.{name}", *values
        else:
            yield field.name, ours, theirs


def _stored(checkpoint: Checkpoint) -> dict[str, Format]:
    """Returns the format of every weight, by its name in an unquantized checkpoint."""
    formats = read_formats(checkpoint.config_json, checkpoint.where(CONFIG_NAME))
    return {weight.full_name: weight.format for weight in find_weights(checkpoint.specs, formats).weights}


def _formats(stored: Mapping[str, Format]) -> tuple[str, ...]:
    """Returns the formats of a checkpoint's weights, the one with most weights first."""
    return tuple(name for name, _ in Counter(map(label, stored.values())).most_common())


_BLOCKS = {"self_attn": "attention", "mlp": "mlp", "eh_proj": "join", "shared_head": "head"}
_ENDS = {"embed_tokens": "embedding", "lm_head": "head"}


def _lossy_blocks(ours: Mapping[str, Format], theirs: Mapping[str, Format]) -> Lossy:
    """Returns the blocks in which the candidate stores a weight in another format that is not dense."""
    changed = [name for name, fmt in theirs.items() if not isinstance(fmt, Dense) and fmt != ours.get(name)]
    blocks = set()
    for parsed in filter(None, map(parse_name, changed)):
        part = parsed.module.split(".")[0]
        known = _ENDS if parsed.layer is None else _BLOCKS
        blocks.add((parsed.layer, known.get(part, part)))
    return frozenset(blocks)


def _missing_mtp(candidate: Checkpoint, stored: Mapping[str, Format]) -> Iterator[str]:
    promised = candidate.config.mtp_layers
    there = [n for n in promised if f"model.layers.{n}.eh_proj.weight" in stored]
    if len(there) < len(promised):
        yield f"config.json promises {len(promised)} MTP layers, {len(there)} are there"


def _layer_nbytes(*checkpoints: Checkpoint) -> dict[int, int]:
    """Returns the bytes of the layers that both have, of both together."""
    nbytes: dict[int, int] = {}
    numbers = []
    for checkpoint in checkpoints:
        own = set()
        for name, spec in checkpoint.specs.items():
            parsed = parse_name(name)
            if parsed is not None and parsed.layer is not None:
                own.add(parsed.layer)
                nbytes[parsed.layer] = nbytes.get(parsed.layer, 0) + spec.nbytes
        numbers.append(own)
    return {number: nbytes[number] for number in sorted(set.intersection(*numbers))}


def _notes(
    found: Findings,
    num_tokens: int,
    limits: Thresholds,
    formats: tuple[tuple[str, ...], tuple[str, ...]],
) -> Iterator[str]:
    """Yields what is left out, or uncertain."""
    ours, theirs = found.mtp_layers
    if ours != theirs:
        yield f"MTP layers: the reference has {ours}, the candidate {theirs}; {len(found.mtp)} were compared"
    if found.routes_per_expert < _FEW_ROUTES:
        yield (
            f"{num_tokens:,} tokens give a routed expert {found.routes_per_expert:.0f} of them on average, "
            "some none: what is wrong in one may not show; take more tokens"
        )
    if limits.preset == "lossless" and {"fp8_block"} & set(formats[0]) & set(formats[1]):
        yield "both are FP8, so equality is expected; --preset fp8 is for weights that were quantized again"


def _perplexity(head: HeadFindings) -> float:
    return perplexity(head.loss_T, int((head.targets_T >= 0).sum()))


def _divergences(head: HeadFindings) -> dict[str, Divergence]:
    num_targets = int((head.targets_T >= 0).sum())
    return {run: divergence(table, num_targets) for run, table in head.tables.items()}
