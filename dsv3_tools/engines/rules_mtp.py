"""Rules about the MTP module: its weights and `num_nextn_predict_layers` must agree."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.engines.engine import Engine
from dsv3_tools.engines.model import ModelView
from dsv3_tools.engines.problems import Problem, counted

__all__ = ["RULES"]

_SHARED = ("embed_tokens.weight", "shared_head.head.weight")
_NO_ACCEPTANCE = (
    "llm-compressor #2735, ms-swift #7848; vLLM #13704, #37667, #43459: no draft accepted, no error"
)


def _key_and_weights(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """`num_nextn_predict_layers` counts the layers whose weights follow the model's own."""
    if not view.has_main or engine.name == "deepseek-infer":
        return
    count = view.dimensions.num_nextn_predict_layers
    if view.extra:
        refuses = engine.family == "vllm"
        yield Problem(
            "mtp-key",
            "refused" if refuses else "note",
            f"config.json: num_nextn_predict_layers is {count}, but {counted(view.extra)} belong to later "
            f"layers; {'KeyError on load' if refuses else 'they are not used'}; set it to the number of MTP "
            "layers, or remove their weights",
            "vLLM 0.32 (tried): KeyError: layers.3.eh_proj.weight" if refuses else "deduced from its loader",
        )
    if count and not view.has_mtp:
        yield Problem(
            "mtp-missing",
            "note",
            f"config.json: num_nextn_predict_layers is {count}, but the MTP module's weights are missing; "
            "speculative decoding would fail or accept nothing; set it to 0, or restore the weights",
            _NO_ACCEPTANCE,
        )


def _incomplete(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """An MTP module must be whole, but for what engines share with the model."""
    if not view.has_mtp or engine.skips_mtp:
        return
    prefixes = tuple(f"model.layers.{layer}." for layer in view.dimensions.mtp_layers)
    lost = [name for name in view.missing if name.startswith(prefixes)]
    shared = [name for name in lost if name.endswith(_SHARED)]
    others = sorted(set(lost) - set(shared))
    if others:
        yield Problem(
            "mtp-incomplete",
            "misread",
            f"{len(others):,} tensors of the MTP module are missing: {list_names(others)}; drafts would be "
            "random; restore them, or remove the module and set num_nextn_predict_layers to 0",
            _NO_ACCEPTANCE,
        )
    if shared and engine.name == "lmdeploy":
        yield Problem(
            "mtp-shared",
            "note",
            f"{list_names(shared)}: missing; LMDeploy's draft has its own, other engines share the model's; "
            "keep them to draft with LMDeploy",
            "LMDeploy 2026-08, pytorch/models/deepseek_mtp.py (read)",
        )


def _number_of_layers(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """SGLang drafts with one MTP layer."""
    count = view.dimensions.num_nextn_predict_layers
    if engine.name == "sglang" and count > 1 and view.has_mtp:
        yield Problem(
            "mtp-count",
            "note",
            f"config.json: num_nextn_predict_layers is {count}, SGLang asserts 1 when it drafts",
            "SGLang 0.5.23, srt/models/deepseek_nextn.py (read)",
        )


def _layer_61(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """The demo's converter leaves out whatever has `model.layers.61` in its name, and nothing else."""
    if engine.name != "deepseek-infer":
        return
    source = "DeepSeek-V3, inference/convert.py (read)"
    layers = {group.layer for group in view.groups if group.layer is not None}
    skipped = {layer for layer in layers if str(layer).startswith("61")}
    main = sorted(layer for layer in skipped if layer < view.dimensions.num_hidden_layers)
    kept = sorted(layer for layer in layers - skipped if view.is_mtp(layer))
    if main:
        yield Problem(
            "layer-61",
            "misread",
            f"model.layers.{main[0]}: is one of the model's own {view.dimensions.num_hidden_layers} layers, "
            "but the demo's convert.py leaves out every name with model.layers.61 in it",
            source,
        )
    if kept:
        yield Problem(
            "layer-61",
            "refused",
            f"model.layers.{kept[0]}: is an MTP layer, and the demo's convert.py leaves out only "
            "model.layers.61 and stops at eh_proj; remove the MTP module",
            source,
        )
    elif skipped and not main:
        yield Problem("layer-61", "note", "model.layers.61: the demo leaves the MTP module out", source)


RULES = (_key_and_weights, _incomplete, _number_of_layers, _layer_61)
"""Rules of this theme, in the order in which their findings are shown."""
