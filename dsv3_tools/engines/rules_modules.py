"""Rules about which modules are quantized: ignore lists, fused linears, `kv_b_proj`, and the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from dsv3_tools.engines.engine import Engine
from dsv3_tools.engines.matching import INFERRED, SPLIT, Matcher
from dsv3_tools.engines.model import ModelView, ModuleGroup
from dsv3_tools.engines.problems import Problem, Severity, counted
from dsv3_tools.engines.rules_tensors import seen
from dsv3_tools.engines.schemes import Scheme

__all__ = ["RULES"]

_STORED_AS: Mapping[str, frozenset[str]] = {
    "w4a8-ct": frozenset({"int4-ct"}),
    "w8a8-int8": frozenset({"int8-channel"}),
    "w4afp8": frozenset({"w4afp8", "fp8-block"}),
}
_FUSED = (
    ("q_a and kv_a", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    ("gate and up", ("mlp.gate_proj", "mlp.up_proj")),
    ("gate and up", ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")),
    ("experts", tuple(f"mlp.experts.{p}_proj" for p in ("gate", "up", "down"))),
)
_LIST_SOURCE = {
    "vllm": "vLLM 0.32, compressed_tensors/utils.py and utils/quant_utils.py:is_layer_skipped (read)",
    "sglang": "SGLang 0.5.23, compressed_tensors/utils.py and quantization/utils.py (read)",
    "transformers": "compressed-tensors 0.20, utils/match.py; transformers 5.23, quantizers_utils.py (read)",
    "lmdeploy": "LMDeploy 2026-08, pytorch/config.py (read)",
    "none": "it reads no ignore list that we know of",
}


def _matcher_for(view: ModelView, engine: Engine) -> Matcher:
    """Returns what `engine` takes each of the view's modules for."""
    layers = view.dimensions.mtp_layers
    return Matcher(
        engine.name,
        view.quantization_config,
        mtp_layer=layers.start if layers else None,
        fuses_q_a=view.dimensions.q_lora_rank is not None,
    )


def _ignore_list(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """What the engine takes for quantized must be, and the rest must not."""
    readable = any(engine.support(s.format).level in ("loads", "flag") for s in view.schemes)
    if not view.quantized or not readable or engine.name == "deepseek-infer":
        return
    matcher = _matcher_for(view, engine)
    found: dict[tuple[str, str], list[str]] = {}
    try:
        for group in seen(view, engine):
            if group.is_linear and not _is_exempt(group, view, engine):
                verdict = _compare(matcher(group.name), group, engine)
                found.setdefault((verdict, group.storage.format), []).extend(group.modules)
        if engine.name == "transformers" and _takes_head(view, matcher):
            found["uncovered", "dense"] = [*found.get(("uncovered", "dense"), []), "lm_head"]
    except re.error as error:
        where = "config.json: quantization_config"
        yield Problem(
            "ignore-pattern",
            "refused",
            f"{where}: an entry of the ignore list is no pattern ({error}); correct it",
            _LIST_SOURCE[engine.family],
        )
        return
    for (verdict, stored), modules in found.items():
        if verdict:
            yield _ignore_problem(verdict, stored, modules, view, engine)


def _is_exempt(group: ModuleGroup, view: ModelView, engine: Engine) -> bool:
    """Whether other rules decide: kv_b_proj by itself, `wk` of the indexer is dequantized on load."""
    if group.kind == "self_attn.kv_b_proj":
        return any(engine.kv_b.get(s.format, ("",))[0] == "quantized" for s in view.schemes)
    return group.kind == "self_attn.indexer.wk"


def _takes_head(view: ModelView, matcher: Matcher) -> bool:
    """Whether compressed-tensors would compress the output layer: it is an nn.Linear like any other."""
    declared = view.quantization_config.get("quant_method") == "compressed-tensors"
    dense = any(group.kind == "lm_head" and not group.storage.is_quantized for group in view.groups)
    return declared and dense and isinstance(matcher("lm_head"), Scheme)


def _compare(expected: Scheme | str | None, group: ModuleGroup, engine: Engine) -> str:
    """Returns what is wrong, "" for nothing."""
    stored = group.storage
    if expected == SPLIT:
        return "split"
    if expected == INFERRED:
        return ""
    if not isinstance(expected, Scheme):
        return "covered" if stored.is_quantized else ""
    if not stored.is_quantized:
        inferred = engine.family == "vllm" and expected.format == "gptq"
        return "" if inferred else "uncovered"
    allowed = _STORED_AS.get(expected.format, frozenset({expected.format}))
    return "" if stored.format in allowed or stored.format.endswith("-bare") else "other"


def _ignore_problem(
    verdict: str, stored: str, modules: list[str], view: ModelView, engine: Engine
) -> Problem:
    source = _LIST_SOURCE[engine.family]
    where = counted(modules) + _only_mtp(modules, view)
    if verdict == "split":
        what = "the ignore list covers some of the linears that are read as one; list all or none"
        return Problem("ignore-split", "refused", f"{where}: {what}", source)
    if verdict == "covered":
        severity: Severity = "misread" if engine.unknown_names == "loads" else "refused"
        what = f"stored as {stored}, but {engine.title} takes the ignore list to cover it; narrow the list"
        return Problem("ignore-covers", severity, f"{where}: {what}", source)
    if verdict == "other":
        what = f"stored as {stored}, but the configuration's targets give it another scheme"
        return Problem("config-tensors", "refused", f"{where}: {what}; correct the targets", source)
    names_differ = any(s.format in ("int4-ct", "gptq", "awq", "w4a8-ct") for s in view.schemes)
    severity = "refused" if names_differ and engine.unknown_names != "loads" else "misread"
    what = f"not quantized, but {engine.title} takes it for quantized"
    if engine.name == "transformers" and not names_differ:
        severity, what = "note", what + " on a GPU (a CPU passes it through)"
    return Problem("ignore-misses", severity, f"{where}: {what}; add it to the ignore list", source)


def _only_mtp(modules: list[str], view: ModelView) -> str:
    prefixes = tuple(f"model.layers.{layer}." for layer in view.dimensions.mtp_layers)
    if prefixes and all(module.startswith(prefixes) for module in modules):
        return " (of the MTP module, which only speculative decoding reads)"
    return ""


def _fused(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Linears that an engine reads as one weight must be stored alike."""
    formats: dict[int | None, dict[str, set[tuple[str, int | None]]]] = {}
    for group in seen(view, engine):
        key = (group.storage.format, group.storage.group_size)
        formats.setdefault(group.layer, {}).setdefault(group.kind, set()).add(key)
    for name, kinds in _FUSED:
        if name not in engine.fused:
            continue
        apart = []
        for layer, by_kind in formats.items():
            every = set().union(*(by_kind.get(kind, set()) for kind in kinds))
            if len(every) > 1:
                apart.append(f"model.layers.{layer}.{kinds[0].rpartition('.')[0]}")
        if apart:
            yield Problem(
                "fused",
                "refused",
                f"{counted(apart)}: {name} are stored differently, {engine.title} reads them as one weight; "
                "store them alike",
                f"{engine.title} {engine.version}, its DeepSeek model (read); vLLM #22352, SGLang #2706",
            )


def _kv_b(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """`kv_b_proj`, which engines absorb into the attention, as each of them wants it."""
    stored = {g.storage.format for g in seen(view, engine) if g.kind == "self_attn.kv_b_proj"}
    formats = {s.format for s in view.schemes} if view.quantized else set()
    for name in sorted(formats & engine.kv_b.keys()):
        needed, source = engine.kv_b[name]
        wrong = "dense" in stored if needed == "quantized" else bool(stored - {"dense"})
        if wrong:
            want = "FP8 with its scale" if needed == "quantized" else "BF16"
            yield Problem(
                "kv-b",
                "refused",
                f"self_attn.kv_b_proj: stored as {', '.join(sorted(stored))}, {engine.title} wants {want} "
                f"in a checkpoint of {name}; convert it so",
                source,
            )


def _never_quantized(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Embeddings, output layer, norms, router and eh_proj are built without quantization everywhere."""
    modules = [
        module
        for group in seen(view, engine)
        if not group.is_linear and group.storage.is_quantized and group.storage.format != "unknown"
        for module in group.modules
    ]
    if modules:
        yield Problem(
            "never-quantized",
            "refused",
            f"{counted(modules)}: quantized, but {engine.title} builds it without quantization; "
            "keep it in BF16",
            f"{engine.title} {engine.version}, its DeepSeek model (read)",
        )


def _sglang_attention(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """SGLang joins q_a and kv_a tensor by tensor, which packed ones do not survive."""
    if engine.name != "sglang" or view.dimensions.q_lora_rank is None:
        return
    modules = [
        module
        for group in seen(view, engine)
        if group.kind in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
        and group.storage.format in ("int4-ct", "gptq")
        for module in group.modules
    ]
    if modules:
        yield Problem(
            "packed-attention",
            "refused",
            f"{counted(modules)}: packed INT4, but SGLang joins q_a and kv_a along dimension 0, weight_shape "
            "and GPTQ's [in / 8, out] too; keep self_attn in BF16",
            "SGLang 0.5.23, srt/models/deepseek_common/deepseek_weight_loader.py (read, not tried)",
        )


def _indexer(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """The sparse-attention indexer of V3.2: FP8 or BF16, and not for every engine."""
    groups = [g for g in view.groups if "indexer" in g.kind]
    integers = [m for g in groups if g.storage.format not in ("dense", "fp8-block") for m in g.modules]
    if engine.name == "deepseek-infer" and groups:
        yield Problem(
            "indexer",
            "refused",
            f"{counted([g.name for g in groups])}: the demo's convert.py stops at unknown names",
            "DeepSeek-V3, inference/convert.py: assert key in mapping (read)",
        )
    elif integers and engine.family in ("vllm", "sglang"):
        yield Problem(
            "indexer",
            "refused",
            f"{counted(integers)}: stored as integers, but wk is dequantized on load from FP8 only and "
            "joined with weights_proj; keep the whole indexer in BF16",
            "vLLM 0.32 and SGLang 0.5.23, DeepSeek-V3.2 (read)",
        )


def _demo_dtypes(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """The demo has one dtype for all its linears."""
    if engine.name != "deepseek-infer":
        return
    linears = [g for g in seen(view, engine) if g.is_linear]
    formats = {g.storage.format for g in linears}
    if len(formats) > 1 or formats - {"dense", "fp8-block"}:
        yield Problem(
            "one-dtype",
            "refused",
            f"linears are stored as {', '.join(sorted(formats))}, the demo has one dtype for all of them, "
            "BF16 or FP8 blocks",
            "DeepSeek-V3, inference/model.py: Linear.dtype (read)",
        )


def _scale_order(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """LMDeploy joins kv_b_proj's pair only if the scale arrives after the weight."""
    if engine.name != "lmdeploy" or not view.weight_map:
        return
    pairs = [
        (module, view.weight_map.get(module + ".weight"), view.weight_map.get(module + ".weight_scale_inv"))
        for group in seen(view, engine)
        if group.kind == "self_attn.kv_b_proj" and group.storage.format == "fp8-block"
        for module in group.modules
    ]
    early = [module for module, weight, scale in pairs if weight and scale and scale < weight]
    late = [module for module, weight, scale in pairs if weight and scale and scale > weight]
    source = "LMDeploy 2026-08, pytorch/models/deepseek_v2.py: _load_weight_attention (read)"
    for modules, where in ((early, "an earlier"), (late, "a later")):
        if modules:
            yield Problem(
                "scale-order",
                "refused" if modules is early else "note",
                f"{counted(modules)}: weight_scale_inv is in {where} shard "
                "than its weight, LMDeploy wants it after the weight; keep both in one shard",
                source,
            )


RULES = (
    _ignore_list,
    _fused,
    _kv_b,
    _never_quantized,
    _sglang_attention,
    _indexer,
    _demo_dtypes,
    _scale_order,
)
"""Rules of this theme, in the order in which their findings are shown."""
