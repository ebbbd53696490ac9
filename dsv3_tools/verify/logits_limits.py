"""What a comparison of logits must reach, by the kind of conversion, and what it missed, with the place.

Errors of whole blocks and experts are there to name the place: what goes wrong in one expert of one layer
moves the last logits by little, but is as large as the expert's output where it happens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv3_tools.errors import UsageError
from dsv3_tools.verify.logits_results import Divergence, LayerResult, Thresholds

__all__ = ["LIMITS", "PRESETS", "Lossy", "choose_preset", "missed", "places", "with_limits"]

LIMITS = {
    "max_kl": "Mean KL divergence in nats, routes replayed.",
    "min_top1": "Share of positions with the same most likely token, from 0 to 1, routes replayed.",
    "min_top5": "Share of the five most likely tokens that are the same, routes replayed.",
    "max_logit_error": "Largest |difference of logits|, routes replayed.",
    "max_free_kl": "Mean KL divergence, each side choosing its experts.",
    "max_perplexity_rise": "CANDIDATE's perplexity / REFERENCE's - 1, routes replayed.",
    "max_block_error": "Error of what a block adds, relative to it, on equal inputs.",
    "max_expert_error": "The same of a routed expert's output.",
    "max_router_error": "Largest difference of a router's scores on equal inputs.",
}
"""What may be limited, by the names of `Thresholds`, in a line each."""

PRESETS: dict[str, Thresholds] = {
    "lossless": Thresholds(
        "lossless",
        max_kl=0.0,
        min_top1=1.0,
        min_top5=1.0,
        max_logit_error=0.0,
        max_free_kl=0.0,
        max_perplexity_rise=0.0,
        max_block_error=0.0,
        max_expert_error=0.0,
        max_router_error=0.0,
    ),
    "fp8": Thresholds(
        "fp8",
        max_kl=0.02,
        min_top1=0.94,
        min_top5=0.93,
        max_free_kl=0.04,
        max_perplexity_rise=0.02,
        max_block_error=0.12,
        max_expert_error=0.15,
        max_router_error=0.0,
    ),
    "int8": Thresholds(
        "int8",
        max_kl=0.004,
        min_top1=0.96,
        min_top5=0.95,
        max_free_kl=0.03,
        max_perplexity_rise=0.01,
        max_block_error=0.05,
        max_expert_error=0.1,
        max_router_error=0.0,
    ),
    "int4": Thresholds(
        "int4",
        max_kl=0.06,
        min_top1=0.85,
        min_top5=0.85,
        max_free_kl=0.1,
        max_perplexity_rise=0.05,
        max_block_error=0.3,
        max_expert_error=0.3,
        max_router_error=0.0,
    ),
}
"""By kind of conversion.

"lossless" is for what changes no weight (FP8 to BF16, splitting, layouts): with weights rounded to BF16 and
the same arithmetic, everything is equal bit for bit. The others leave room above what the shipped model gives
(INT8: KL 0.0002, top-1 98.5 %, experts 0.02; INT4 with absmax: 0.011, 91 %, 0.2), and are narrow for what a
single expert or block may be off. fp8 goes by FP8's ratio of signal to error, 31.5 dB. The router is never
quantized here, so on equal inputs its scores are equal; where another tool has folded a smoothing into norm
and router, give a --max-router-error.
"""

_COARSENESS = ("lossless", "int8", "fp8", "int4")
_FEW_LAYERS = 3
_FEW_TOKENS = 8
"""Experts with fewer tokens are not held to a limit but 0: one token's error is no figure of an expert."""


def choose_preset(reference: Sequence[str], candidate: Sequence[str]) -> str:
    """Returns the preset for weights in some formats against weights in others.

    It is that of the coarsest format that only the candidate has; a candidate without one must be equal.
    """
    kinds = {_kind(name) for name in candidate} - {_kind(name) for name in reference}
    return max(kinds, key=_COARSENESS.index, default="lossless")


def _kind(format_name: str) -> str:
    """Returns the preset that a format's own error calls for."""
    name = format_name.lower()
    return next((kind for kind in reversed(_COARSENESS) if name.startswith(kind)), "lossless")


def with_limits(preset: str, limits: Mapping[str, float | None]) -> Thresholds:
    """Returns a preset with some limits set by hand; None leaves the preset's.

    Raises:
        UsageError: no such preset, or a limit that nothing could reach.
    """
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
    for name, value in limits.items():
        most = 1.0 if name.startswith("min_") else math.inf
        if value is not None and not 0 <= value <= most:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option}: got {value:g}, expected a number from 0 to {most:g}")
    changes: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    return dataclasses.replace(PRESETS[preset], **changes)


def missed(limits: Thresholds, runs: Mapping[str, Divergence], reference_perplexity: float) -> Iterator[str]:
    """Yields the figures of all tokens that were not reached."""
    replayed, free = runs["replayed"], runs["free"]
    rise = replayed.perplexity / reference_perplexity - 1
    by = f"(preset {limits.preset})"
    checks = (
        ("KL(reference || candidate), routes replayed", replayed.kl, limits.max_kl, " nats"),
        ("largest |difference of logits|", replayed.max_logit_error, limits.max_logit_error, ""),
        ("KL(reference || candidate), routes free", free.kl, limits.max_free_kl, " nats"),
        ("rise of perplexity", rise, limits.max_perplexity_rise, ""),
    )
    for what, value, limit, unit in checks:
        if limit is not None and not value <= limit:  # NaN is never reached
            yield f"{what} is {value:.4g}{unit}, expected at most {limit:.4g} {by}"
    shares = (
        ("same most likely token", replayed.top1, limits.min_top1),
        ("same five most likely tokens", replayed.top5, limits.min_top5),
    )
    for what, share, least in shares:
        if least is not None and not share >= least:
            yield f"{what}: {100 * share:.3f} %, expected at least {100 * least:.4g} % {by}"


Lossy = frozenset[tuple[int | None, str]]
"""Blocks in which the candidate has weights in a coarser format: layer (None outside layers) and block."""


def places(
    limits: Thresholds, layers: Sequence[LayerResult], lossy: Lossy, *, embedding: float, head: float
) -> Iterator[str]:
    """Yields where the candidate's own errors are larger than allowed, layer by layer within a kind.

    Blocks without a weight in a coarser format must give the same, unless a limit was set by hand.
    """
    ends = _block_limit(limits, lossy, None, "embedding"), _block_limit(limits, lossy, None, "head")
    if _exceeds(embedding, ends[0]):
        yield f"embedding: error {embedding:.4g} of the hidden states, {_allowed(ends[0])}"
    yield from _in_layers(limits, [layer for layer in layers if layer.kind != "mtp"], lossy)
    if _exceeds(head, ends[1]):
        yield f"final norm or lm_head: error {head:.4g} of the logits, {_allowed(ends[1])}"
    yield from _in_layers(limits, [layer for layer in layers if layer.kind == "mtp"], lossy)


def _block_limit(limits: Thresholds, lossy: Lossy, layer: int | None, block: str) -> float | None:
    by_hand = limits.max_block_error != PRESETS[limits.preset].max_block_error
    return limits.max_block_error if by_hand or (layer, block) in lossy else 0.0


def _in_layers(limits: Thresholds, layers: Sequence[LayerResult], lossy: Lossy) -> Iterator[str]:
    """Yields where layers exceed their limits."""
    yield from _grouped("input (eh_proj, enorm, hnorm)", _own(limits, layers, lossy, "join"))
    hint = "; in so many layers: the order of rows (rope, heads), or config.json?"
    attention = _own(limits, layers, lossy, "attention")
    yield from _grouped("attention or the norm before it", attention, hint)
    yield from _grouped("router", _routers(limits, layers))
    yield from _grouped("MLP", _mlps(limits, layers, lossy))
    yield from _grouped("shared_head (norm or head)", _own(limits, layers, lossy, "head"))


def _own(
    limits: Thresholds, layers: Sequence[LayerResult], lossy: Lossy, block: str
) -> Iterator[tuple[LayerResult, str]]:
    for layer in layers:
        error, limit = getattr(layer, block), _block_limit(limits, lossy, layer.number, block)
        if error is not None and _exceeds(error, limit):
            yield layer, f"error {error:.4g} of what it gives, {_allowed(limit)}"


def _routers(limits: Thresholds, layers: Sequence[LayerResult]) -> Iterator[tuple[LayerResult, str]]:
    for layer in layers:
        if layer.router is None or not _exceeds(layer.router, limits.max_router_error):
            continue
        moved = f"{100 * (layer.rerouted or 0):.2f} % of tokens go to other experts"
        both = _exceeds(layer.mlp, limits.max_block_error) or bool(_bad_experts(limits, layer))
        cause = "; the experts differ, too: the norm before them?" if both else ""
        allowed = _allowed(limits.max_router_error)
        yield layer, f"scores differ by up to {layer.router:.4g} on equal inputs, {allowed}; {moved}{cause}"


def _mlps(
    limits: Thresholds, layers: Sequence[LayerResult], lossy: Lossy
) -> Iterator[tuple[LayerResult, str]]:
    for layer in layers:
        limit = _block_limit(limits, lossy, layer.number, "mlp")
        experts = _bad_experts(limits, layer)
        if experts:
            errors = ", ".join(f"{number} ({error:.3g})" for number, error in experts)
            noun = "routed expert" if len(experts) == 1 else "routed experts"
            yield layer, f"{noun} {errors}: error of their output, {_allowed(limits.max_expert_error)}"
        elif _exceeds(layer.mlp, limit):
            what = (
                "MLP or the norm before it" if layer.kind == "dense" else "experts, or the norm before them"
            )
            yield layer, f"{what}: error {layer.mlp:.4g} of what they add, {_allowed(limit)}"


def _bad_experts(limits: Thresholds, layer: LayerResult) -> list[tuple[int, float]]:
    """Returns the experts with too large an error, and of these those that stand out."""
    if limits.max_expert_error is None or not layer.experts or layer.mlp == 0:
        return []
    largest = layer.experts[0].error
    return [
        (expert.number, expert.error)
        for expert in layer.experts
        if expert.error > limits.max_expert_error
        and expert.error >= largest / 3
        and (expert.num_tokens >= _FEW_TOKENS or limits.max_expert_error == 0)
    ]


def _grouped(kind: str, found: Iterator[tuple[LayerResult, str]], hint: str = "") -> Iterator[str]:
    """Yields a line for each layer, or one for many that all have the same kind of trouble."""
    results = list(found)
    if len(results) <= _FEW_LAYERS:
        yield from (f"{_name(layer)}: {_short(kind, text)}" for layer, text in results)
        return
    numbers = [layer.number for layer, _ in results]
    first, text = results[0]
    yield f"{len(numbers)} layers, {_ranges(numbers)}: {kind}; in {_name(first)}: {text}{hint}"


def _short(kind: str, text: str) -> str:
    """Returns a layer's line; those on MLPs name the part themselves."""
    return text if kind == "MLP" else f"{kind}: {text}"


def _name(layer: LayerResult) -> str:
    return f"{'MTP layer' if layer.kind == 'mtp' else 'layer'} {layer.number}"


def _ranges(numbers: Sequence[int]) -> str:
    """Returns 3-5, 9 for 3, 4, 5, 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _exceeds(value: float, limit: float | None) -> bool:
    return limit is not None and not value <= limit


def _allowed(limit: float | None) -> str:
    return "expected none" if limit == 0 else f"expected at most {limit:.4g}"
