"""compressed-tensors' `quantization_config`: written for our formats, and read.

Source: `compressed_tensors/quantization/quant_config.py` and `quant_args.py` (0.20).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_tools.errors import FormatError
from dsv3_tools.formats.base import Format
from dsv3_tools.formats.fp8_block import FP8Block, read_block_size
from dsv3_tools.formats.int4 import INT4Packed, is_group_size
from dsv3_tools.formats.int8 import INT8Channel

__all__ = ["METHOD", "SCALE_NAME", "quantization_config", "read_formats"]

METHOD = "compressed-tensors"

SCALE_NAME = "weight_scale"
"""Name of the part with the scales, of FP8 blocks as well."""

_ON_DISK = {INT4Packed: "pack-quantized", INT8Channel: "int-quantized", FP8Block: "float-quantized"}


def quantization_config(
    groups: Sequence[tuple[Format, Sequence[str]]], ignore: Sequence[str], *, activations: str | None = None
) -> dict[str, Any]:
    """Returns the `quantization_config` of a checkpoint with these formats.

    Args:
        groups: formats and the modules that have them, as class names, names or "re:" patterns. The
            first is the one that `activations` is about.
        ignore: modules that are not quantized, in the same notation.
        activations: "fp8" has the engine quantize the inputs of INT4 weights; None leaves them as they
            are, but for INT8 and FP8 weights, whose inputs are quantized alike.
    """
    formats = [_ON_DISK[type(fmt)] for fmt, _ in groups]
    return {
        "config_groups": {
            f"group_{number}": {
                "format": formats[number],
                "input_activations": _activations(fmt, activations if number == 0 else None),
                "output_activations": None,
                "targets": list(targets),
                "weights": _weights(fmt),
            }
            for number, (fmt, targets) in enumerate(groups)
        },
        "format": formats[0] if len(set(formats)) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def read_formats(config: Mapping[str, Any], where: str) -> tuple[Format, ...]:
    """Returns the formats of the weights that a `quantization_config` of compressed-tensors describes.

    Raises:
        FormatError: one that is not known here, or weights that are not compressed.
    """
    status = config.get("quantization_status", "compressed")
    groups = config.get("config_groups")
    if status != "compressed" or not isinstance(groups, dict) or not groups:
        number = len(groups) if isinstance(groups, dict) else 0
        raise FormatError(
            f"{where}: quantization_status is {status!r} with {number} config_groups, expected "
            "'compressed' with at least one"
        )
    found = [_read_group(group, config, f"{where}: {name}") for name, group in groups.items()]
    return tuple(dict.fromkeys(found))


def _arguments(bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    """Returns one set of quantization arguments, with every key that compressed-tensors writes."""
    plain: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": None,
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
    }
    return plain | others


def _weights(fmt: Format) -> dict[str, Any]:
    if isinstance(fmt, INT4Packed):
        observer = "mse" if fmt.search == "mse" else "minmax"
        whole_rows = fmt.group_size == -1
        return _arguments(
            4,
            "int",
            "channel" if whole_rows else "group",
            group_size=None if whole_rows else fmt.group_size,
            symmetric=fmt.symmetric,
            observer=observer,
        )
    if isinstance(fmt, FP8Block):
        return _arguments(8, "float", "block", block_structure=list(fmt.block_size), observer="minmax")
    return _arguments(8, "int", "channel", observer="minmax")


def _activations(fmt: Format, wanted: str | None) -> dict[str, Any] | None:
    if isinstance(fmt, INT8Channel):
        return _arguments(8, "int", "token", dynamic=True)
    if isinstance(fmt, FP8Block):
        return _arguments(8, "float", "group", dynamic=True, group_size=fmt.block_size[1])
    return _arguments(8, "float", "token", dynamic=True) if wanted == "fp8" else None


def _read_group(group: Any, config: Mapping[str, Any], where: str) -> Format:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise FormatError(f"{where}: no weights, expected their quantization")
    on_disk = group.get("format") or config.get("format")
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    symmetric, group_size = weights.get("symmetric", True) is True, weights.get("group_size")
    if (on_disk, kind, bits) == ("pack-quantized", "int", 4) and strategy in ("group", "channel"):
        if weights.get("actorder") not in (None, False, "weight", "static"):
            raise FormatError(f"{where}: actorder is {weights['actorder']!r}, expected none, or 'static'")
        size = group_size if strategy == "group" else -1
        if not is_group_size(size):
            raise FormatError(f"{where}: group_size is {size!r}, expected a multiple of 8 or -1")
        return INT4Packed(size, symmetric)
    is_channel = (kind, bits, strategy, symmetric) == ("int", 8, "channel", True)
    if on_disk in ("int-quantized", "naive-quantized") and is_channel:
        return INT8Channel()
    if on_disk in ("float-quantized", "naive-quantized") and (kind, bits, strategy) == ("float", 8, "block"):
        return FP8Block(read_block_size(weights, "block_structure", where), scale_name=SCALE_NAME)
    raise FormatError(
        f"{where}: {on_disk!r} with {bits!r} bits of type {kind!r}, strategy {strategy!r}, symmetric "
        f"{symmetric}; expected pack-quantized 4-bit groups, int-quantized symmetric 8-bit channels or "
        "float-quantized 8-bit blocks"
    )
