"""Tensor names of the DeepSeek-V3 family, parsed in one place.

Source: the released index (`model.layers.{L}.mlp.experts.{E}.down_proj.weight` and so on) and, for
the indexer of V3.2, DeepSeek-V3.2-Exp.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["MODULES", "TensorName", "list_names", "parse_name"]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

FP8_LINEARS = frozenset(
    {
        f"self_attn.{p}"
        for p in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    | {f"{mlp}.{p}" for mlp in ("mlp", "mlp.experts", "mlp.shared_experts") for p in _PROJECTIONS}
    | {"self_attn.indexer.wq_b", "self_attn.indexer.wk"}
)
"""Linears that the released FP8 checkpoints store in FP8, expert numbers left out."""

_NORMS = frozenset(
    {"input_layernorm", "post_attention_layernorm", "enorm", "hnorm", "norm", "shared_head.norm"}
    | {f"self_attn.{n}" for n in ("q_a_layernorm", "kv_a_layernorm", "indexer.k_norm")}
)

_OTHERS = frozenset(
    {"embed_tokens", "lm_head", "eh_proj", "shared_head.head", "mlp.gate"}
    | {"self_attn.indexer.weights_proj", "self_attn.rotary_emb"}
)

MODULES = FP8_LINEARS | _NORMS | _OTHERS
"""Every module of the family, without layer and expert numbers."""

_NUMBER = r"(0|[1-9][0-9]{0,5})"
_IN_LAYER = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)\.([A-Za-z0-9_]+)")
_TOP_LEVEL = re.compile(r"(?:model\.(embed_tokens|norm)|(lm_head))\.([A-Za-z0-9_]+)")
_EXPERT = re.compile(rf"mlp\.experts\.{_NUMBER}\.(.+)")


@dataclass(frozen=True, slots=True)
class TensorName:
    """One tensor's name, taken apart.

    `module` has no layer or expert number ("mlp.experts.down_proj"), `prefix` is the full module name
    ("model.layers.3.mlp.experts.7.down_proj"), `parameter` the last part ("weight").
    """

    prefix: str
    module: str
    parameter: str
    layer: int | None = None
    expert: int | None = None

    @property
    def is_fp8_linear(self) -> bool:
        """Whether the released FP8 checkpoints store this module's weight in FP8."""
        return self.module in FP8_LINEARS

    @property
    def is_routed_expert(self) -> bool:
        """Whether this tensor belongs to a routed expert."""
        return self.expert is not None


@lru_cache(maxsize=1 << 18)
def parse_name(name: str) -> TensorName | None:
    """Returns `name` taken apart, or None when no model of the family has such a module.

    Remembers the names of a few checkpoints: planning asks several times for each of 91,991.
    """
    prefix, _, _ = name.rpartition(".")
    if top := _TOP_LEVEL.fullmatch(name):
        return TensorName(prefix, top[1] or top[2], top[3])
    inside = _IN_LAYER.fullmatch(name)
    if inside is None:
        return None
    module, expert = inside[2], None
    if numbered := _EXPERT.fullmatch(module):
        expert, module = int(numbered[1]), f"mlp.experts.{numbered[2]}"
    elif module.startswith("mlp.experts"):
        return None
    if module not in MODULES or module in ("lm_head", "norm"):
        return None
    return TensorName(prefix, module, inside[3], int(inside[1]), expert)


def list_names(names: Sequence[str]) -> str:
    """Returns the first five names, and dots if there are more."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
