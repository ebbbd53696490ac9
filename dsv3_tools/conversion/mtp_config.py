"""`config.json` without the model or without its MTP module: layers, and lists of what is not quantized.

An entry of such a list belongs to the module if some engine finds one of its modules by it, and none of the
main model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from dsv3_tools.checkpoint.config import NEXTN_ARCHITECTURE, with_quantization
from dsv3_tools.conversion.ignore import asked_names
from dsv3_tools.formats import Dense
from dsv3_tools.formats.stored import StoredWeight

__all__ = ["NEXTN_KEY", "Entries", "nextn_config", "without_mtp"]

NEXTN_KEY = "num_nextn_predict_layers"

_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "dynamic")
"""Keys of `quantization_config` that list what is not quantized: of compressed-tensors, FP8 and INT8, AWQ,
GPTQ (a table, whose keys are the entries)."""

_REGEX = ("re:", "-:", "+:")
_NUMBERED = re.compile(r"layers(?P<dot>\\?\.)(?P<open>\(?)(?P<numbers>\d+(?:\|\d+)*)(?P<close>\)?)")


class Entries:
    """Which entries of a list concern one of these modules."""

    def __init__(self, weights: Sequence[StoredWeight], mtp_layers: range = range(0)) -> None:
        self._weights, self._mtp_layers = weights, mtp_layers

    @cached_property
    def _text(self) -> str:
        return "\n".join(asked_names(self._weights, self._mtp_layers))

    def concern(self, entry: str) -> bool:
        """Whether any engine would find a module by `entry`: by its beginning, or anywhere in its name."""
        if not entry.startswith(_REGEX):
            return entry in self._text
        try:
            return (
                re.search(f"^(?:{entry[3 if entry.startswith('re:') else 2 :]})", self._text, re.M)
                is not None
            )
        except re.error:
            return False


def without_mtp(
    document: Mapping[str, Any], main: Sequence[StoredWeight], mtp: Sequence[StoredWeight]
) -> dict[str, Any]:
    """Returns the main model's `config.json`: no MTP layers, and nothing about them in the lists."""
    edited = {**document, NEXTN_KEY: 0}
    quantization = document.get("quantization_config")
    if not isinstance(quantization, dict):
        return edited
    if all(isinstance(weight.format, Dense) for weight in main):
        return with_quantization(edited, None)
    layers = [weight.name.layer for weight in mtp if weight.name.layer is not None]
    ours, theirs = Entries(main), Entries(mtp, range(min(layers), max(layers) + 1))

    def keep(entry: str) -> str | None:
        return entry if ours.concern(entry) or not theirs.concern(entry) else None

    return with_quantization(edited, _edit_lists(quantization, keep))


def nextn_config(document: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Returns the `config.json` of an MTP module that is exported as a model with the one layer 0.

    Source: SGLang's `scripts/export_deepseek_nextn.py`, which changes these two keys. Entries of lists that
    name layers by number follow; those of other layers go.
    """
    edited = {**document, "architectures": [NEXTN_ARCHITECTURE], "num_hidden_layers": 1}
    return _renumbered(edited, layer, 0)


def _edit_lists(quantization: Mapping[str, Any], edit: Callable[[str], str | None]) -> dict[str, Any]:
    """Returns a `quantization_config` with every entry of its lists edited, or removed where that is None."""
    edited = dict(quantization)
    for key in _LISTS:
        value = quantization.get(key)
        if isinstance(value, list):
            made = [edit(entry) if isinstance(entry, str) else entry for entry in value]
            edited[key] = [entry for entry in made if entry is not None]
        elif isinstance(value, dict):
            pairs = [(edit(entry), rule) for entry, rule in value.items()]
            edited[key] = {entry: rule for entry, rule in pairs if entry is not None}
    return edited


def _renumbered(document: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    quantization = document.get("quantization_config")
    if not isinstance(quantization, dict):
        return dict(document)

    def edit(entry: str) -> str | None:
        found = _NUMBERED.search(entry)
        if found is None:
            return entry
        if str(old) not in found["numbers"].split("|"):
            return None
        place = f"layers{found['dot']}{found['open']}{new}{found['close']}"
        return entry[: found.start()] + place + entry[found.end() :]

    return with_quantization(document, _edit_lists(quantization, edit))
