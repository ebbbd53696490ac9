"""Rules about `config.json`: what it says, and whether the weights bear it out."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_tools.engines.engine import FORMATS, Engine
from dsv3_tools.engines.model import ModelView
from dsv3_tools.engines.problems import Problem, Severity, counted
from dsv3_tools.engines.schemes import Scheme

__all__ = ["RULES"]


def _architecture(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """The model class that config.json names must be one that the engine has."""
    names = view.config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    if engine.architectures and first not in engine.architectures:
        yield Problem(
            "architecture",
            "refused",
            f"config.json: architectures is {str(names)[:80]}, {engine.title} knows "
            f"{', '.join(sorted(engine.architectures))}; name the one whose weights these are",
            f"{engine.title} {engine.version}: its list of models (read)",
        )
    if engine.name == "transformers" and view.config.get("model_type") == "kimi_k2":
        yield Problem(
            "architecture",
            "note",
            "config.json: model_type is kimi_k2, which transformers does not have; needs "
            "trust_remote_code=True and the model's own *.py files",
            "transformers 5.23, models/auto/configuration_auto.py (read)",
        )


def _method(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """The declared format must be one that the engine reads; what it needs for it is a note."""
    names = {scheme.format for scheme in view.schemes} or {_stored_format(view)}
    for name in sorted(names):
        support = engine.support(name)
        if support.level == "loads" or name not in FORMATS or not _has_weights(view, name):
            continue
        severity: Severity = "note" if support.level == "flag" else support.level
        said = f"{engine.title} {support.note}"
        if severity != "note":
            said += "; convert to a format that it reads (docs/engines.md)"
        yield Problem("format", severity, f"config.json: {FORMATS[name]}: {said}", support.source)
    for name in sorted(names - FORMATS.keys() - {""}):
        yield Problem(
            "format",
            "refused",
            f"config.json: quantization is {name}, which {engine.title} does not read for this model",
            engine.methods,
        )


def _stored_format(view: ModelView) -> str:
    """Returns the format of a model without schemes, "" if that is for other rules to say."""
    formats = {group.storage.format for group in view.quantized}
    if not formats:
        return "" if view.quantization_config else "bf16"
    return "w4afp8" if "w4afp8" in formats else ""


def _has_weights(view: ModelView, name: str) -> bool:
    """Whether there is anything quantized that a format could be about."""
    return name == "bf16" or bool(view.quantized)


def _leftover(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """A `quantization_config` over weights that are not quantized."""
    present = "quantization_config" in view.config
    if view.quantized or not present:
        return
    found = engine.leftover
    if not view.quantization_config and engine.name != "lightllm":
        return
    if found.level != "loads":
        severity: Severity = "note" if found.level == "flag" else found.level
        yield Problem(
            "leftover-config",
            severity,
            "config.json: has a quantization_config, but no weight is quantized: "
            f"{engine.title} {found.note}; remove the key from config.json",
            found.source,
        )


def _undeclared(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Quantized weights without a `quantization_config`: raw codes."""
    if view.quantization_config or not view.quantized or engine.name == "deepseek-infer":
        return
    formats = sorted({group.storage.format for group in view.quantized})
    if engine.name == "tensorrt-llm" and "w4afp8" in formats:
        return
    severity: Severity = "misread" if engine.unknown_names == "loads" else "refused"
    yield Problem(
        "missing-config",
        severity,
        f"config.json: has no quantization_config, but {len(view.quantized):,} groups of weights are stored "
        f"as {', '.join(formats)}, such as {view.quantized[0].name}; add the one that describes them",
        f"deduced: {engine.title} builds unquantized linears without it",
    )


def _fp8_config(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Keys of block formats that engines insist on."""
    config = view.quantization_config
    if not any(scheme.format in ("fp8-block", "int8-block") for scheme in view.schemes):
        return
    if config.get("activation_scheme", "dynamic") != "dynamic" and engine.family in ("vllm", "sglang"):
        yield _config_problem(
            "activation-scheme",
            "refused",
            f"activation_scheme is {str(config['activation_scheme'])[:40]!r}, expected 'dynamic' (blocks are "
            "scaled as they come)",
            f"{engine.title} {engine.version}, fp8.py and blockwise_int8.py (read)",
        )
    fixed = engine.name in ("tensorrt-llm", "lmdeploy", "lightllm", "deepseek-infer")
    if fixed and view.block != (128, 128):
        yield _config_problem(
            "block-size",
            "refused",
            f"weight_block_size is {list(view.block)}, {engine.title} has [128, 128] built in",
            engine.support("fp8-block").source,
        )
    if config.get("weight_scale_semantics") == "inverse":
        yield _config_problem(
            "inverse-scales",
            "misread",
            "weight_scale_semantics is 'inverse' (the scales are stored as reciprocals), but the engine "
            "multiplies by them; write the scales as DeepSeek does",
            "GPTQModel 7.7 writes them so (read); no engine reads the key (read)",
        )
    if config.get("scale_fmt") == "ue8m0" and engine.name == "transformers":
        yield _config_problem(
            "ue8m0",
            "note",
            "scale_fmt is 'ue8m0': on a GPU, transformers makes float8_e8m0fnu scales of the float32 ones",
            "transformers 5.23, integrations/finegrained_fp8.py (read)",
        )


def _groups(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Group size, order and zero points of INT4."""
    for scheme in view.schemes:
        if scheme.format not in ("int4-ct", "gptq", "awq", "w4a8-ct"):
            continue
        if engine.support(scheme.format).level not in ("loads", "flag"):
            continue
        size = scheme.group_size
        if scheme.format == "w4a8-ct" and size != 128:
            yield _group_problem(scheme, "expected 128 (W4A8 kernels)", engine)
        elif engine.group_sizes and size is not None and size not in engine.group_sizes:
            known = ", ".join(map(str, sorted(engine.group_sizes)))
            yield _group_problem(scheme, f"{engine.title} has kernels for {known}", engine)
        if scheme.actorder not in (None, "static", "weight") and engine.family == "vllm":
            yield _config_problem(
                "act-order",
                "refused",
                f"{scheme.format} with actorder {scheme.actorder!r} or desc_act, expected none, or 'static' "
                "(groups whose members are scattered need another kernel)",
                "vLLM 0.32, auto_gptq.py and compressed_tensors (read)",
            )
        if not scheme.symmetric and _doubts_zero_points(scheme, engine):
            yield _config_problem(
                "zero-points",
                "note",
                f"{scheme.format} without symmetry: several versions take experts with zero points in one of "
                "their kernels only, or not at all; try it, or quantize symmetrically",
                "vLLM, compressed_tensors_moe_wna16.py of several versions (read); 0.32 not tried",
            )
        if not scheme.symmetric and _refuses_zero_points(scheme, engine):
            yield _config_problem(
                "zero-points",
                "refused",
                f"{scheme.format} without symmetry, expected symmetric weights (no kernel for zero points "
                "of experts)",
                "vLLM 0.32, auto_gptq.py; SGLang 0.5.23, Triton WNA16 experts are symmetric (read); "
                "transformers 5.23, integrations/compressed_tensors.py (tried)",
            )


def _doubts_zero_points(scheme: Scheme, engine: Engine) -> bool:
    return scheme.format in ("int4-ct", "w4a8-ct") and engine.family == "vllm"


def _refuses_zero_points(scheme: Scheme, engine: Engine) -> bool:
    if scheme.format == "gptq":
        return engine.family in ("vllm", "sglang")
    return scheme.format in ("int4-ct", "w4a8-ct") and engine.family in ("sglang", "transformers")


def _gptq(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Keys that readers of GPTQ and AWQ need."""
    config = view.quantization_config
    formats = {scheme.format for scheme in view.schemes}
    if "gptq" in formats and engine.name == "sglang":
        needed = [k for k in ("bits", "group_size", "desc_act", "sym") if k not in config]
        if needed:
            yield _config_problem(
                "gptq-keys",
                "refused",
                f"has no {', '.join(needed)}, which SGLang needs",
                "SGLang 0.5.23, srt/layers/quantization/gptq.py (read)",
            )
    for scheme in view.schemes:
        bits = {"gptq": (4, 8), "awq": (4,)}.get(scheme.format)
        if bits is not None and engine.family in ("vllm", "sglang") and scheme.bits not in bits:
            yield _config_problem(
                "bits",
                "refused",
                f"bits is {scheme.bits}, expected {' or '.join(map(str, bits))} for {scheme.format}",
                "vLLM 0.32, auto_gptq.py and AWQ (read)",
            )


def _surroundings(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """What else in config.json or the index matters to one engine."""
    if engine.name == "transformers" and not view.has_index_metadata:
        yield Problem(
            "index-metadata",
            "refused",
            "model.safetensors.index.json: has no metadata, expected at least {} (KeyError: 'metadata')",
            "transformers 5.23 (tried)",
        )
    if engine.name == "vllm" and view.config.get("rope_scaling") is None:
        yield Problem(
            "no-yarn",
            "note",
            "config.json: rope_scaling is null: a toy model without yarn gave other logits than transformers "
            "(KL 0.28, against 2e-4 with yarn); compare before relying on it",
            "vLLM 0.32 (tried on a toy)",
        )
    if engine.name == "deepseek-infer" and view.dimensions.hidden_size != 7168:
        yield Problem(
            "router-bias-size",
            "refused",
            f"config.json: hidden_size is {view.dimensions.hidden_size:,}, expected 7,168 (the demo's router "
            "has a bias only at that size, and it loads strictly)",
            "DeepSeek-V3, inference/model.py: Gate (read)",
        )


def _group_problem(scheme: Scheme, why: str, engine: Engine) -> Problem:
    return _config_problem(
        "group-size",
        "refused",
        f"group size of {scheme.format} is {scheme.group_size}, {why}",
        engine.support(scheme.format).source,
    )


def _config_problem(rule: str, severity: Severity, what: str, source: str) -> Problem:
    return Problem(rule, severity, f"config.json: quantization_config: {what}", source)


def _mixed_tensors(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Weights in a format that the configuration does not declare at all."""
    if not view.schemes:
        return
    allowed = {scheme.format for scheme in view.schemes}
    if allowed & {"w4a8-ct"}:
        allowed.add("int4-ct")
    if "w8a8-int8" in allowed:
        allowed.add("int8-channel")
    if "w4afp8" in allowed:
        allowed.add("fp8-block")
    others: dict[str, list[str]] = {}
    for group in view.quantized:
        if group.storage.format not in allowed and not group.storage.format.endswith("-bare"):
            others.setdefault(group.storage.format, []).extend(group.modules)
    for found, modules in others.items():
        yield Problem(
            "config-tensors",
            "refused" if engine.unknown_names == "refused" else "misread",
            f"{counted(modules)}: stored as {found}, config.json declares {', '.join(sorted(allowed))}; "
            "write the quantization_config that describes them",
            f"deduced: {engine.title} reads what is declared",
        )


RULES = (
    _architecture,
    _method,
    _leftover,
    _undeclared,
    _fp8_config,
    _groups,
    _gptq,
    _surroundings,
    _mixed_tensors,
)
"""Rules of this theme, in the order in which their findings are shown."""
