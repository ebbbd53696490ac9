"""What a model card says beyond a result's files: kept in the manifest, for a card that is made later."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.names import TensorName, parse_name
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import is_model_name
from dsv3_tools.conversion.card_yaml import CARD_NAME, MAX_CARD_BYTES, read_metadata
from dsv3_tools.conversion.plan import SOURCE, Plan, Step, what_becomes
from dsv3_tools.errors import CheckpointError
from dsv3_tools.formats.fp8_block import LIKE_PART

__all__ = ["card_facts", "source_card"]

_TAKEN = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "base_model")
"""What a result has from its source's card: nothing of it is made up here."""

_MAX_ITEMS, _MAX_LENGTH = 100, 300

_CACHE_FOLDER = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*)", re.ASCII)

_PARTS = {
    "embed_tokens": "embeddings",
    "lm_head": "output matrix",
    "shared_head.head": "output matrix",
    "eh_proj": "projection of its input",
    "self_attn.kv_b_proj": "attention, kv_b_proj",
    "mlp.gate": "router",
}
_PREFIXES = {
    "mlp.experts.": "routed experts",
    "mlp.shared_experts.": "shared experts",
    "mlp.": "dense MLP",
    "self_attn.": "attention",
}

_Key = tuple[bool, str, str, str]
"""Of a change: whether it is in the MTP module, the part of the model, the form before and after."""


def card_facts(plan: Plan, source: Checkpoint) -> dict[str, Any]:
    """Returns what the manifest says for the sake of the card.

    "changes" are what becomes what, by part of the model; "config_changes" the keys of `config.json` that
    are not what they were; "source_card" what the source's own card says of licence and the like.
    """
    facts: dict[str, Any] = {"changes": _changes(plan, source)}
    if plan.config_name == CONFIG_NAME:
        facts["config_changes"] = _config_changes(source.config_json, json.loads(plan.config))
    if plan.source_card:
        facts["source_card"] = dict(plan.source_card)
    return facts


def _changes(plan: Plan, source: Checkpoint) -> list[dict[str, Any]]:
    """Returns what becomes what, by part of the model: the MTP module last, else the largest first."""
    counts: Counter[_Key] = Counter()
    before: Counter[_Key] = Counter()
    after: Counter[_Key] = Counter()
    for step in (step for shard in plan.shards for step in shard.steps):
        name = parse_name(step.weight.name)
        key = (_is_mtp(step, name, source), _part(name), *what_becomes(step))
        counts[key] += 1
        own = {part: spec for part, spec in step.input_specs(step.shape).items() if part != LIKE_PART}
        before[key] += sum(spec.nbytes for spec in own.values())
        after[key] += sum(spec.nbytes for spec in step.output_specs(step.shape).values())
    names = ("mtp", "part", "before", "after")
    return [
        dict(zip(names, key, strict=True))
        | {"count": counts[key], "nbytes_before": before[key], "nbytes_after": after[key]}
        for key in sorted(counts, key=lambda key: (key[0], -before[key], key))
    ]


def _is_mtp(step: Step, name: TensorName | None, source: Checkpoint) -> bool:
    """Whether a step is about the MTP module, which merging takes from a checkpoint of its own."""
    if step.weight.origin != SOURCE:
        return True
    return name is not None and name.layer in source.config.mtp_layers


def _part(name: TensorName | None) -> str:
    """Returns the part of the model that a tensor belongs to."""
    if name is None:
        return "others"
    if name.parameter == "e_score_correction_bias":
        return "router's correction bias"
    if "norm" in name.module:
        return "norms"
    if name.module in _PARTS:
        return _PARTS[name.module]
    return next((part for prefix, part in _PREFIXES.items() if name.module.startswith(prefix)), "others")


def _config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the keys that came, went, or have another value, in the order of the file."""
    return {
        "added": [key for key in after if key not in before],
        "removed": [key for key in before if key not in after],
        "changed": [key for key in after if key in before and before[key] != after[key]],
    }


def source_card(source: Checkpoint) -> dict[str, Any]:
    """Returns what the source's card says, and which model on the Hub a cache folder belongs to."""
    try:
        text = source.read_file(CARD_NAME, MAX_CARD_BYTES) if source.has_file(CARD_NAME) else b""
    except CheckpointError:  # a link out, say: it is not needed
        text = b""
    found = read_metadata(text)
    taken = {key: found[key] for key in _TAKEN if _is_plain(found.get(key))}
    base = taken.pop("base_model", [])
    if models := [name for name in ([base] if isinstance(base, str) else base) if is_model_name(name)]:
        taken["base_model"] = models
    repository = _cached_repository(source)
    return taken | ({"base_model": repository} if repository else {})


def _is_plain(value: Any) -> bool:
    """Whether `value` is a short text, or a list of such."""
    items = value if isinstance(value, list) else [value]
    return 0 < len(items) <= _MAX_ITEMS and all(
        isinstance(item, str) and item.isprintable() and 0 < len(item) <= _MAX_LENGTH for item in items
    )


def _cached_repository(source: Checkpoint) -> str | None:
    """Returns org/name of the model whose folder in a Hugging Face cache this is."""
    if not isinstance(source.source, Path):
        return None
    folder = source.source.absolute()
    match = _CACHE_FOLDER.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return None if match is None else f"{match[1]}/{match[2]}"
