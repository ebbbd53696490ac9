"""Rules about a `quantization_config` that contradicts itself or the INT4 tensors that it describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv3_tools.engines.engine import Engine
from dsv3_tools.engines.model import ModelView
from dsv3_tools.engines.problems import Problem, counted
from dsv3_tools.engines.schemes import table

__all__ = ["RULES"]

_MODEL = (
    "compressed-tensors 0.20, quantization/quant_args.py: validated on load (tried with transformers 5.23)"
)
_TENSORS = "compressed-tensors 0.20, compressors/pack_quantized (tried with transformers 5.23)"


def _arguments(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """compressed-tensors' arguments exclude each other: a group has a size, a channel has none."""
    config = view.quantization_config
    if config.get("quant_method") != "compressed-tensors" or not engine.support("int4-ct").level:
        return
    groups = table(config.get("config_groups"))
    if not groups:
        yield _refused("config_groups is empty, expected at least one group; write what the weights are in")
    for name, group in groups.items():
        weights = table(table(group).get("weights"))
        strategy, size = weights.get("strategy"), weights.get("group_size")
        if strategy == "group" and (type(size) is not int or size <= 0):
            yield _refused(f"{name}: strategy 'group' with group_size {_shown(size)}, expected a number")
        elif strategy == "channel" and type(size) is int and size > 0:
            yield _refused(f"{name}: strategy 'channel' with group_size {size}, expected none")


def _zero_points(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Zero points that are there are used or not as the config says, whatever is in them."""
    declared = {scheme.symmetric for scheme in view.schemes if scheme.format in ("int4-ct", "w4a8-ct")}
    if len(declared) != 1 or engine.support("int4-ct").level not in ("loads", "flag"):
        return
    symmetric = declared == {True}
    modules = [
        module
        for group in view.linears
        if group.storage.format == "int4-ct"
        if (group.storage.part("weight_zero_point") is not None) == symmetric
        for module in group.modules
    ]
    if modules and symmetric:
        yield Problem(
            "zero-points-unused",
            "misread",
            f"{counted(modules)}: have zero points, but config.json says symmetric; correct it",
            _TENSORS,
        )
    elif modules:
        yield Problem(
            "zero-points-missing",
            "refused",
            f"{counted(modules)}: have no zero points, but config.json says not symmetric; correct it",
            _TENSORS,
        )


def _words(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """A word of 32 bits holds as many codes as the config's bits say."""
    found = [s for s in view.schemes if s.format in ("gptq", "awq") and s.bits not in (None, 4)]
    modules = [m for g in view.linears if g.storage.format in ("gptq", "awq") for m in g.modules]
    if found and modules and engine.support(found[0].format).level in ("loads", "flag"):
        yield Problem(
            "bits",
            "refused",
            f"{counted(modules)}: codes of 4 bits, config.json says {found[0].bits}; correct bits",
            f"{engine.title} {engine.version}: allocates by config.json (read)",
        )


def _awq_variant(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """Other AWQ kernels store other words."""
    config = view.quantization_config
    if str(config.get("quant_method")).removesuffix("_marlin") != "awq":
        return
    version, zero_point = str(config.get("version", "gemm")).lower(), config.get("zero_point", True)
    if engine.support("awq").level in ("loads", "flag") and (version != "gemm" or zero_point is not True):
        yield Problem(
            "awq-variant",
            "refused",
            f"config.json: AWQ of version {version[:20]!r} with zero_point {_shown(zero_point)}, expected "
            "'gemm' and true: words are packed otherwise",
            "AutoAWQ, modules/linear (read); that engines look at the version was not tried",
        )


def _refused(message: str) -> Problem:
    return Problem("config-arguments", "refused", f"config.json: quantization_config: {message}", _MODEL)


def _shown(value: Any) -> str:
    return repr(value)[:40]


RULES = (_arguments, _zero_points, _words, _awq_variant)
"""Rules of this theme, in the order in which their findings are shown."""
