"""What a `quantization_config` declares, read without trusting that any of it is well formed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Scheme", "declared_schemes", "strings", "table"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way of storing weights that a `quantization_config` declares.

    Attributes:
        format: a name of `engine.FORMATS`, or what the file says if it is none of them.
        group_size: inputs that share a scale; -1 for one scale for each output, None if not said.
        block: rows and columns that share a scale, for block formats.
        symmetric: whether there are no zero points.
        actorder: the file's `actorder` or "group" for GPTQ's `desc_act`; None for none.
        bits: of a weight.
        targets: compressed-tensors' targets.
    """

    format: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    actorder: str | None = None
    bits: int | None = None
    targets: tuple[str, ...] = ("Linear",)


def table(value: Any) -> Mapping[str, Any]:
    """Returns `value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def strings(value: Any) -> tuple[str, ...]:
    """Returns the strings in `value` if it is a list, else none."""
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, (list, tuple)) else ()


def declared_schemes(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """Returns the schemes of a `quantization_config`, one for each group of compressed-tensors."""
    method = config.get("quant_method")
    if method == "compressed-tensors":
        groups = table(config.get("config_groups")).values()
        return tuple(_group_scheme(table(group), config.get("format")) for group in groups)
    if method in ("fp8", "blockwise_int8"):
        block = _block(config.get("weight_block_size"))
        name = "fp8-block" if method == "fp8" else "int8-block"
        return (Scheme(name if block else f"{method} without weight_block_size", block=block),)
    if method in ("gptq", "gptq_marlin"):
        actorder = "group" if config.get("desc_act") is True else None
        symmetric = config.get("sym") is not False
        return (
            Scheme(
                "gptq",
                _whole(config.get("group_size")),
                None,
                symmetric,
                actorder,
                _whole(config.get("bits")),
            ),
        )
    if method in ("awq", "awq_marlin"):
        return (Scheme("awq", _whole(config.get("group_size")), bits=_whole(config.get("bits"))),)
    if method in ("w4afp8", "w8a8_int8"):
        return (Scheme("w4afp8", 128) if method == "w4afp8" else Scheme("w8a8-int8"),)
    return (Scheme(f"quant_method {str(method)[:60]!r}"),)


def _group_scheme(group: Mapping[str, Any], whole: Any) -> Scheme:
    weights, inputs = table(group.get("weights")), group.get("input_activations")
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    name = f"compressed-tensors {str(kind)[:20]} {str(bits)[:20]} bits by {str(strategy)[:20]}"
    if (kind, bits, strategy) == ("int", 8, "channel") and _is(inputs, "int"):
        name = "int8-channel"
    elif (kind, bits) == ("int", 4) and strategy in ("group", "channel") and _is_packed(group, whole):
        name = "int4-ct" if inputs is None else "w4a8-ct" if _is(inputs, "float") else name
    elif (kind, bits) == ("float", 8) and strategy in ("block", "channel", "tensor"):
        name = "fp8-ct-block" if strategy == "block" else "fp8-ct-channel"
    actorder = weights.get("actorder")
    return Scheme(
        name,
        _whole(weights.get("group_size")) or (-1 if strategy == "channel" else None),
        _block(weights.get("block_structure")),
        weights.get("symmetric") is not False,
        str(actorder)[:20] if actorder not in (None, False) else None,
        _whole(bits),
        strings(group.get("targets")),
    )


def _is(inputs: Any, kind: str) -> bool:
    """Whether the activations are rounded to eight bits of this kind as they come."""
    found = table(inputs)
    return (found.get("type"), found.get("num_bits"), found.get("dynamic")) == (kind, 8, True)


def _is_packed(group: Mapping[str, Any], whole: Any) -> bool:
    return (group.get("format") or whole or "pack-quantized") == "pack-quantized"


def _block(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    return None


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None
