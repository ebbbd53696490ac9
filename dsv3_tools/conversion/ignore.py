"""How `config.json` says which linears are not quantized, in each engine's own way.

Engines ask under other names than the checkpoint's: gate and up are one linear, and so are the two that
read the hidden state in attention; SGLang calls the MTP layer `model.decoder`. A list has to match them, too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsv3_tools.checkpoint.names import FP8_LINEARS
from dsv3_tools.formats.stored import StoredWeight

__all__ = ["Unquantized", "asked_names", "find_unquantized", "names", "patterns", "substrings"]

_OTHER_LINEARS = frozenset(
    {"lm_head", "mlp.gate", "eh_proj", "shared_head.head", "self_attn.indexer.weights_proj"}
)
_LINEARS = FP8_LINEARS | _OTHER_LINEARS

_AREAS = {
    "self_attn": r"self_attn\.",
    "mlp.shared_experts": r"mlp\.shared_experts\.",
    "mlp.experts": r"mlp\.experts",
}
"""Parts of a layer that are named as a whole when nothing in them is quantized."""

_DENSE = frozenset({"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})

_FUSED = {
    "self_attn.q_a_proj": ("self_attn.fused_qkv_a_proj", "self_attn.fused_qkv_a_proj_with_mqa"),
    "self_attn.kv_a_proj_with_mqa": (),
    "mlp.gate_proj": ("mlp.gate_up_proj",),
    "mlp.shared_experts.gate_proj": ("mlp.shared_experts.gate_up_proj",),
}
"""What engines call linears that they fuse, beside the first of them."""


@dataclass(frozen=True)
class Unquantized:
    """Linears that are not quantized.

    Attributes:
        everywhere: kinds of which none is ("self_attn.o_proj").
        layers: of the other kinds, the layers in which they are not.
        mtp_layers: which layers are MTP modules.
        areas: names of `_AREAS` in which nothing is quantized anywhere.
    """

    everywhere: tuple[str, ...]
    layers: dict[str, tuple[int, ...]]
    mtp_layers: tuple[int, ...]
    areas: tuple[str, ...]

    def kinds_outside_areas(self) -> Iterator[str]:
        """Yields the kinds that no area covers."""
        return (kind for kind in self.everywhere if not _area(kind, self.areas))


def find_unquantized(
    weights: Sequence[StoredWeight], quantized: Iterable[str], mtp_layers: Sequence[int]
) -> Unquantized:
    """Returns what is not among the `quantized` modules (full names)."""
    chosen = frozenset(quantized)
    without: dict[str, set[int]] = defaultdict(set)
    having: dict[str, int] = defaultdict(int)
    for weight in weights:
        name = weight.name
        if name.module not in _LINEARS or name.parameter != "weight":
            continue
        if name.prefix in chosen:
            having[name.module] += 1
        else:
            without[name.module].add(-1 if name.layer is None else name.layer)
    everywhere = tuple(sorted(kind for kind in without if not having[kind]))
    areas = tuple(
        area for area in _AREAS if _is_bare(area, having) and any(_area(k, (area,)) for k in without)
    )
    layers = {kind: tuple(sorted(numbers)) for kind, numbers in sorted(without.items()) if having[kind]}
    return Unquantized(everywhere, layers, tuple(mtp_layers), areas)


def patterns(unquantized: Unquantized, prefix: str) -> list[str]:
    """Returns regular expressions for full names, each after `prefix` ("re:" or "-:").

    compressed-tensors' notation has "re:", GPTQModel's `dynamic` has "-:"; both are matched from the
    name's start.
    """
    found = [f"{prefix}.*{_AREAS[area]}.*" for area in unquantized.areas]
    kinds = set(unquantized.kinds_outside_areas())
    if kinds >= _DENSE:
        kinds -= _DENSE
        found.append(rf"{prefix}.*mlp\.(gate|up|gate_up|down)_proj$")
    if prefix == "re:" and "lm_head" in kinds:
        kinds.remove("lm_head")
        found.append("lm_head")
    found += [f"{prefix}.*{_alternatives(kind)}$" for kind in sorted(kinds)]
    for kind, layers in unquantized.layers.items():
        numbered = "|".join(map(str, layers))
        place = rf"layers\.({numbered})"
        if set(layers) & set(unquantized.mtp_layers):
            place = rf"({place}|decoder)"
        tail = _AREAS["mlp.experts"] + ".*" if kind.startswith("mlp.experts.") else _alternatives(kind) + "$"
        found.append(rf"{prefix}.*{place}\.{tail}")
    return list(dict.fromkeys(found))


def substrings(unquantized: Unquantized) -> list[str]:
    """Returns strings of which one is in the name of every module that is not quantized, for AWQ."""
    found = list(unquantized.areas)
    for kind in unquantized.kinds_outside_areas():
        # "mlp.gate" is in "mlp.gate_proj", too; no engine quantizes the router, listed or not.
        if kind != "mlp.gate" or "mlp.gate_proj" in unquantized.everywhere:
            found += [kind, *_FUSED.get(kind, ())]
    for kind, layers in unquantized.layers.items():
        for layer in layers:
            part = "mlp.experts" if kind.startswith("mlp.experts.") else kind
            found += [f"model.layers.{layer}.{name}" for name in (part, *_FUSED.get(kind, ()))]
    return list(dict.fromkeys(found))


def names(weights: Sequence[StoredWeight], quantized: Iterable[str]) -> list[str]:
    """Returns the full names of all linears that released checkpoints quantize and this one does not.

    What engines fuse is there under the fused names, too.
    """
    chosen = frozenset(quantized)
    found = []
    for weight in weights:
        name = weight.name
        if name.module in FP8_LINEARS and name.parameter == "weight" and name.prefix not in chosen:
            layer = name.prefix.removesuffix(name.module)
            found += [name.prefix, *(layer + fused for fused in _FUSED.get(name.module, ()))]
    return sorted(found)


def asked_names(weights: Iterable[StoredWeight], mtp_layers: Container[int | None] = ()) -> list[str]:
    """Returns every name under which an engine may look one of the weights' modules up in a list."""
    found: dict[str, None] = {}
    for name in (weight.name for weight in weights):
        layer = name.prefix.removesuffix(name.module)
        asked = [name.prefix, *(layer + fused for fused in _FUSED.get(name.module, ()))]
        if name.is_routed_expert:
            asked.append(f"{name.prefix.partition('.experts.')[0]}.experts")
        if name.layer in mtp_layers:
            own = f"model.layers.{name.layer}."
            asked += [f"model.decoder.{module.removeprefix(own)}" for module in asked]
        found |= dict.fromkeys(asked)
    return list(found)


def _area(kind: str, areas: Iterable[str]) -> bool:
    return any(kind.startswith(f"{area}.") for area in areas)


def _is_bare(area: str, having: dict[str, int]) -> bool:
    return not any(count for kind, count in having.items() if _area(kind, (area,)))


def _alternatives(kind: str) -> str:
    """Returns a pattern for a kind of linear under its own and its fused names."""
    found = [kind, *_FUSED.get(kind, ())]
    escaped = [re.escape(name) for name in found]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
