"""The command that makes a result, written again from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["command_words"]

_GROUPS = {
    "fp8-to-bf16": ("convert", "fp8-to-bf16"),
    "bf16-to-fp8": ("convert", "bf16-to-fp8"),
    "int8-to-bf16": ("convert", "int8-to-bf16"),
    "int4-to-bf16": ("convert", "int4-to-bf16"),
    "to-deepseek-infer": ("convert", "to-deepseek-infer"),
    "quantize int8": ("quantize", "int8"),
    "quantize int4": ("quantize", "int4"),
    "split-mtp --main": ("split-mtp",),
    "split-mtp --mtp": ("split-mtp",),
    "merge-mtp": ("merge-mtp",),
}
_CALIBRATION = ("method", "damping", "dtype", "max_shard_size")
"""What a calibrated run's own record has of its command."""

_NOT_GIVEN = {"int8-to-bf16": ("scale_semantics",), "int4-to-bf16": ("scale_semantics",)}
"""Options in a manifest that its command has not."""


def command_words(manifest: Mapping[str, Any], places: Mapping[str, str], result: str) -> list[str]:
    """Returns the words of the command line.

    Options are spelled out though they are defaults: another version may have others. `--partial`, which
    changes no byte, is not in a manifest.

    Args:
        manifest: of the result.
        places: what to write for the sources, by origin, and for calibration data.
        result: what to write for the destination.

    Raises:
        KeyError: an operation or a source that is not known.
    """
    operation, options = manifest["operation"], dict(manifest["options"])
    words = ["dsv3", *_GROUPS[operation], places["source"]]
    if operation == "merge-mtp":
        words.append(places["mtp"])
    words += [operation.split()[1], result] if operation.startswith("split-mtp") else [result]
    if options.pop("like", False):
        words += ["--like", places["like"]]
    for name in _NOT_GIVEN.get(operation, ()):
        options.pop(name, None)
    if options.get("layout") == "sglang-nextn":
        options.pop("drop_shared", None)  # it always does
    calibration = options.pop("calibration", None)
    if calibration is not None:
        options.pop("scale_search", None)  # scales are chosen by the inputs
        options |= {name: calibration[name] for name in _CALIBRATION if name in calibration}
    for name, value in options.items():
        words += _option(name, value)
    if calibration is not None:
        words += ["--calibration", places["calibration"]]
    if manifest.get("nonfinite"):
        words += ["--nonfinite", "keep"]
    return words


def _option(name: str, value: Any) -> list[str]:
    """Returns the words for one option; none for what is off or not set."""
    flag = "--" + name.replace("_", "-")
    if name == "symmetric":
        return ["--symmetric" if value else "--asymmetric"]
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, list):
        return [word for item in value for word in (flag, str(item))]
    return [flag, str(value)]
