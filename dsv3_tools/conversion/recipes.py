"""Which weights a quantization is for: recipes as data, and a user's own patterns on top.

Source of the choice: routed experts are 97 % of the parameters, so INT4 leaves everything else alone at
almost no cost in size; engines build the router, `lm_head`, `eh_proj` and the embeddings without
quantization; `kv_b_proj` is absorbed into attention, which few engines do with integer weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dsv3_tools.checkpoint.names import FP8_LINEARS
from dsv3_tools.errors import UsageError
from dsv3_tools.formats.stored import StoredWeight

__all__ = ["FP8_REST", "MODULES", "QUANTIZABLE", "TIED", "Selection", "select"]

_ROUTED = frozenset(name for name in FP8_LINEARS if name.startswith("mlp.experts."))
_INDEXER = frozenset(name for name in FP8_LINEARS if ".indexer." in name)

QUANTIZABLE = FP8_LINEARS - _INDEXER
"""Linears that may be quantized to integers at all; engines fuse those of the indexer in BF16."""

MODULES: Mapping[str, frozenset[str]] = {
    "int4": _ROUTED,
    "int8": QUANTIZABLE - {"self_attn.kv_b_proj"},
}
"""Linears that each quantization takes unless told otherwise."""

FP8_REST = QUANTIZABLE - {"self_attn.kv_b_proj"}
"""Linears that `--rest fp8` leaves in, or takes to, FP8."""

TIED: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"),
)
"""Linears of a layer that engines load as one: all of them are quantized, or none."""


@dataclass(frozen=True)
class Selection:
    """The modules that are quantized, by full name ("model.layers.3.mlp.experts.0.up_proj")."""

    modules: frozenset[str]

    def __contains__(self, weight: StoredWeight) -> bool:
        return weight.name.prefix in self.modules and weight.name.parameter == "weight"


def select(
    weights: Sequence[StoredWeight],
    kinds: Iterable[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kept_layers: Sequence[int] = (),
) -> Selection:
    """Returns the modules to quantize.

    Args:
        weights: all of the checkpoint.
        kinds: modules that are quantized anyway, without layer and expert numbers.
        include: patterns of full module names, with `*`, `?` and `[...]`, to quantize as well.
        exclude: patterns of those to leave out, which wins.
        kept_layers: layers in which nothing is quantized.

    Raises:
        UsageError: a pattern that fits no module that can be quantized, or a choice that splits linears
            which engines load as one.
    """
    kinds = frozenset(kinds)
    candidates = [w.name for w in weights if w.name.module in QUANTIZABLE and w.name.parameter == "weight"]
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name.prefix, pattern) for name in candidates):
                raise UsageError(
                    f"{option} {pattern!r}: fits no linear that can be quantized; patterns are of full names "
                    "such as 'model.layers.3.self_attn.o_proj' or '*.shared_experts.*'"
                )
    chosen = [
        name
        for name in candidates
        if name.layer not in kept_layers
        and (name.module in kinds or _fits(name.prefix, include))
        and not _fits(name.prefix, exclude)
    ]
    selection = Selection(frozenset(name.prefix for name in chosen))
    if not chosen:
        raise UsageError("nothing would be quantized: --exclude and --mtp keep leave no linear")
    for pattern in include:
        if not any(fnmatchcase(name.prefix, pattern) for name in chosen):
            raise UsageError(f"--include {pattern!r}: --exclude or --mtp keep leaves out all that it fits")
    _check_tied(weights, selection)
    return selection


def _fits(prefix: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(prefix, pattern) for pattern in patterns)


def _check_tied(weights: Sequence[StoredWeight], selection: Selection) -> None:
    """Refuses a selection that takes a part of what engines load as one linear or one set of experts."""
    group_of = {kind: number for number, kinds in enumerate(TIED) for kind in kinds}
    seen: dict[tuple[int | None, int], tuple[str, bool]] = {}
    for weight in weights:
        group = group_of.get(weight.name.module)
        if group is None or weight.name.parameter != "weight":
            continue
        first, first_chosen = seen.setdefault(
            (weight.name.layer, group), (weight.name.prefix, weight in selection)
        )
        if (weight in selection) != first_chosen:
            raise UsageError(
                f"{weight.name.prefix} and {first} would be stored differently; engines load "
                f"{', '.join(TIED[group])} of a layer as one: include or exclude all of them"
            )
