"""Rules about tensors: which are there, and whether a weight and its scales fit each other."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.engines.engine import Engine
from dsv3_tools.engines.model import ModelView, ModuleGroup
from dsv3_tools.engines.problems import Problem, Severity, counted

__all__ = ["RULES", "seen"]

_RELEASE = "the released checkpoint and DeepSeek-V3, README_WEIGHTS.md (read)"
_CODES = frozenset({"weight", "weight_packed", "qweight"})
_SCALES = frozenset({"weight_scale_inv", "weight_scale", "scales"})
_SILENT = (
    "the reference script writes such checkpoints (DeepSeek-V3, inference/fp8_cast_bf16.py); mlx-lm #1192"
)


def seen(view: ModelView, engine: Engine) -> Iterator[ModuleGroup]:
    """Yields the groups that the engine reads: not those of an MTP module that it skips."""
    for group in view.groups:
        if not (engine.skips_mtp and view.is_mtp(group.layer)):
            yield group


def _missing(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Every tensor of the model itself must be there; a draft alone is said to be one."""
    if not view.has_main:
        yield from _draft(view, engine)
        return
    mtp = tuple(f"model.layers.{layer}." for layer in view.dimensions.mtp_layers)
    names = [name for name in view.missing if not (mtp and name.startswith(mtp))]
    if names:
        severity: Severity = "misread" if engine.unknown_names == "loads" else "refused"
        what = "leaves them random, with a warning only" if severity == "misread" else "needs them"
        yield Problem(
            "missing-tensors",
            severity,
            f"{len(names):,} of the model's tensors are missing: {list_names(names)}; {engine.title} {what}",
            f"{engine.title} {engine.version} (deduced from its loader)",
        )


def _draft(view: ModelView, engine: Engine) -> Iterator[Problem]:
    nextn = view.config.get("architectures") == ["DeepseekV3ForCausalLMNextN"]
    takes = {"sglang", "lightllm"} if nextn else {"vllm", "vllm-ascend", "lmdeploy"}
    layout = "exported (layer 0)" if nextn else "with its own layer number"
    yield Problem(
        "draft-only",
        "note" if engine.name in takes and (nextn or view.has_mtp) else "refused",
        f"only an MTP module is here, {layout}: it is a draft for speculative decoding, not a model; "
        f"{', '.join(sorted(takes))} take it beside the main checkpoint",
        "vLLM 0.32: speculative_config.model (tried); LMDeploy 2026-08: pytorch/models/deepseek_mtp.py, "
        "SGLang: scripts/export_deepseek_nextn.py (read)",
    )


def _unexpected(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Tensors that the model does not have."""
    if not view.has_main or not view.unexpected:
        return
    lenient = engine.unknown_names == "loads"
    yield Problem(
        "unexpected-tensors",
        "note" if lenient else "refused",
        f"{len(view.unexpected):,} tensors do not belong to the model that config.json describes: "
        f"{list_names(view.unexpected)}; {'a warning only' if lenient else 'loaders stop at unknown names'}",
        f"{engine.title} {engine.version} (deduced from its loader)",
    )


def _shapes(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Weights must have the shapes that config.json makes them."""
    wrong: list[str] = []
    for group in seen(view, engine):
        expected = view.expected.get(group.name + ".weight")
        if expected is None:
            continue
        if group.storage.shape is not None and group.storage.shape != expected.shape:
            wrong += [
                f"{m} is {list(group.storage.shape)}, not {list(expected.shape)}" for m in group.modules
            ]
    if wrong:
        yield Problem(
            "shape",
            "refused",
            f"{len(wrong):,} weights have other shapes than config.json makes them: {list_names(wrong)}",
            "every engine allocates by config.json",
        )


def _scales(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Each quantized weight needs all its tensors, and nothing else may be beside it."""
    lost: dict[str, list[str]] = {}
    orphans: dict[str, list[str]] = {}
    for group in seen(view, engine):
        for name in group.storage.missing:
            lost.setdefault(name, []).extend(group.modules)
        for name in group.storage.orphans:
            orphans.setdefault(name, []).extend(group.modules)
    for name, modules in lost.items():
        if name == "g_idx" and engine.family == "vllm":
            continue  # a name mapper drops it there
        if name == "weight_shape" and engine.name == "transformers":
            continue  # made up from the packed weight's shape
        yield Problem(
            "scale-missing" if "scale" in name else "part-missing",
            "misread" if "scale" in name else "refused",
            f"{counted(modules)}: no {name}; without it the codes mean nothing or do not load; convert again",
            _SILENT if "scale" in name else f"{engine.title} {engine.version}: registers it (read)",
        )
    for name, modules in orphans.items():
        lenient = engine.unknown_names == "loads"
        yield Problem(
            "scale-orphan",
            ("misread" if name in _CODES else "note") if lenient else "refused",
            f"{counted(modules)}: {name} belongs to no weight in this format; remove it, or restore the "
            "quantized weight",
            f"deduced: {engine.title} has no such parameter",
        )


def _scale_shapes(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Scales must have one number for each block, row or group."""
    for group in seen(view, engine):
        for name, spec, expected in group.storage.misshapen(view.block):
            shape = list(group.storage.shape or ())
            yield Problem(
                "scale-shape",
                "refused",
                f"{counted(group.modules)}: {name} is {spec}, expected {expected} for a weight of {shape}",
                _RELEASE
                if group.storage.format == "fp8-block"
                else "compressed-tensors 0.20, GPTQModel 7.7 (read)",
            )


def _scale_dtypes(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Scales must have the dtype that engines allocate, or are rounded."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for group in seen(view, engine):
        fmt = group.storage.format
        for name, spec in group.storage.signature:
            if (
                name in _SCALES
                and name not in group.storage.orphans
                and (kind := _scale_kind(fmt, spec.dtype))
            ):
                found.setdefault((kind, name, spec.dtype), []).extend(group.modules)
    for (kind, name, dtype), modules in found.items():
        where = f"{counted(modules)}: {name} is {dtype}"
        if kind == "no float":
            message, source = f"{where}, expected F32 or BF16; convert again", _RELEASE
        elif kind == "rounded":
            message, source = (
                f"{where}, DeepSeek's is F32: the weights are rounded; write it in F32",
                _RELEASE,
            )
        elif engine.family in ("vllm", "sglang"):
            message = (
                f"{where} and is cast to the model's dtype, so that weights differ from those that were "
                "quantized for; quantize against scales in BF16"
            )
            source = f"{engine.title} {engine.version}, wNa16 parameters have the model's dtype (read)"
        else:
            continue
        yield Problem("scale-dtype", "refused" if kind == "no float" else "note", message, source)


def _scale_kind(fmt: str, dtype: str) -> str:
    """Returns what is the matter with a scale's dtype, "" for nothing."""
    if dtype not in ("F32", "BF16", "F16"):
        return "no float"
    if fmt in ("fp8-block", "int8-block", "w4afp8"):
        return "" if dtype == "F32" else "rounded"
    return "cast" if fmt in ("int4-ct", "gptq", "awq") and dtype in ("F32", "F16") else ""


def _groups(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """The group size in the configuration must be that of the scales."""
    sizes = {scheme.group_size for scheme in view.schemes if scheme.group_size is not None}
    wrong: dict[int, list[str]] = {}
    for group in seen(view, engine):
        size = group.storage.group_size
        whole = (group.storage.shape or ())[-1:] == (size,)
        if size is None or not sizes or size in sizes or (whole and -1 in sizes):
            continue
        wrong.setdefault(size, []).extend(group.modules)
    for size, modules in wrong.items():
        yield Problem(
            "group-mismatch",
            "refused",
            f"{counted(modules)}: one scale for {size} inputs, config.json says {sorted(sizes)}; correct the "
            "group size",
            f"{engine.title} {engine.version}: allocates by config.json (read)",
        )


def _fp8_rows(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Blocks for transformers are the rows divided by the rows of scales: wrong if one is partial."""
    if engine.name != "transformers":
        return
    fails: list[str] = []
    wrong: list[str] = []
    for group in seen(view, engine):
        scale, shape = group.storage.part("weight_scale_inv"), group.storage.shape
        if group.storage.format != "fp8-block" or scale is None or shape is None or 0 in scale.shape:
            continue
        if len(shape) != 2 or len(scale.shape) != 2:
            continue
        pairs = list(zip(shape, scale.shape, view.block, strict=True))
        if any(size % count for size, count, _ in pairs):
            fails += group.modules
        elif any(count > 1 and size // count != block for size, count, block in pairs):
            wrong += group.modules
    source = "transformers 5.23, integrations/finegrained_fp8.py: Fp8Dequantize (tried); llm-compressor #1817"
    if fails:
        yield Problem(
            "fp8-rows",
            "refused",
            f"{counted(fails)}: dequantizing (always on a CPU) wants the rows to divide by the rows of "
            "scales, and a last block is partial; convert to BF16, or leave these in BF16",
            source,
        )
    if wrong:
        yield Problem(
            "fp8-rows",
            "misread",
            f"{counted(wrong)}: dequantizing (always on a CPU) takes blocks of rows // rows of scales, not "
            f"{list(view.block)}, as a last block is partial; convert to BF16, or leave these in BF16",
            source,
        )


def _router_bias(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """The router's correction bias is float32 in the release."""
    rounded = []
    for group in seen(view, engine):
        bias = group.storage.part("e_score_correction_bias")
        if bias is not None and bias.dtype != "F32":
            rounded += group.modules
    if rounded:
        yield Problem(
            "router-bias",
            "note",
            f"{counted(rounded)}: the router's bias is not F32: it loads, rounded, and tokens go to other "
            "experts; keep it in float32",
            "vLLM #23640, transformers #42580",
        )


RULES = (
    _missing,
    _unexpected,
    _shapes,
    _scales,
    _scale_shapes,
    _scale_dtypes,
    _groups,
    _fp8_rows,
    _router_bias,
)
"""Rules of this theme, in the order in which their findings are shown."""
