"""Which modules an engine takes for quantized: its own reading of ignore lists and targets.

An engine asks about its own modules, not about those of the checkpoint: `q_a_proj` and
`kv_a_proj_with_mqa` are one linear for it, `gate_proj` and `up_proj` another, all experts of a layer a
third. Whether it then asks about the members, and how a list's entry matches a name, differs by engine
and method. Read in vLLM 0.32 (`compressed_tensors/utils.py`, `utils/quant_utils.py:is_layer_skipped`,
`utils/gptq_utils.py`), SGLang 0.5.23 (the files of the same names; `quantization/utils.py`),
transformers 5.23 (`quantizers/quantizers_utils.py`) with compressed-tensors 0.20 (`utils/match.py`),
and LMDeploy of 2026-08 (`pytorch/config.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from dsv3_tools.engines.data import ENGINES
from dsv3_tools.engines.schemes import Scheme, declared_schemes, strings, table

__all__ = ["INFERRED", "SPLIT", "Matcher", "exact_or_regex", "is_ignored"]

SPLIT: Final = "split"
"""Members of one fused linear get different answers, which the engine refuses."""

INFERRED: Final = "inferred"
"""The engine goes by the tensors that it finds."""

Answer = Scheme | None | Literal["split", "inferred"]
Test = Callable[[str, Sequence[str]], bool]

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+\.(?:gate|up|down)_proj")
_FUSED: Mapping[str, tuple[str, ...]] = {
    "gate_proj": ("gate_proj", "up_proj"),
    "up_proj": ("gate_proj", "up_proj"),
    "q_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "kv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_FUSED_NAMES = {
    "vllm": {"gate_proj": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj"},
    "sglang": {"gate_proj": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj_with_mqa"},
}


def _exact(name: str, entries: Sequence[str]) -> bool:
    """Whether the name is in the list."""
    return name in entries


def exact_or_regex(name: str, entries: Sequence[str]) -> bool:
    """Whether an entry is the name, or `re:` and a pattern that matches from the name's start."""
    return any(
        re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
        for entry in entries
    )


def _suffix_or_regex(name: str, entries: Sequence[str]) -> bool:
    """As `exact_or_regex`, and whether the name ends in a dot and an entry."""
    return exact_or_regex(name, entries) or any(name.endswith(f".{entry}") for entry in entries)


def _dotted(name: str, entries: Sequence[str]) -> bool:
    """Whether an entry's parts, between dots, follow each other in the name."""
    return any(f".{entry}." in f".{name}." for entry in entries)


def _substring(name: str, entries: Sequence[str]) -> bool:
    """Whether an entry is anywhere in the name."""
    return any(entry in name for entry in entries)


def _contained(name: str, entries: Sequence[str]) -> bool:
    """Whether the name is anywhere in an entry."""
    return any(name in entry for entry in entries)


def _boundary(name: str, entries: Sequence[str]) -> bool:
    """Whether an entry is a pattern for the name's beginning up to a dot, or the name's end."""
    edge = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{entry}){edge}", name) or name.endswith(entry) for entry in entries)


def _negative(name: str, entries: Sequence[str]) -> bool:
    """Whether a `dynamic` rule that starts in `-:` matches from the name's start."""
    return any(entry.startswith("-:") and re.match(entry[2:], name) is not None for entry in entries)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How one engine reads one method's list.

    `unfused` are the fused linears whose members it asks about instead; `experts` is how it asks about
    routed experts: "layer" by the name of all together, "first" by expert 0's three linears,
    "containing" by whether an entry has the name of all in it, "each" one by one, "never",
    or "inferred" from what is there.
    """

    keys: tuple[str, ...]
    test: Test
    unfused: frozenset[str] = frozenset()
    experts: str = "layer"


_BOTH = frozenset({"gate_proj", "q_a_proj"})
_QKV = frozenset({"q_a_proj"})
_LISTS = ("ignored_layers", "modules_to_not_convert")
_READINGS: Mapping[tuple[str, str], _Reading] = {
    ("vllm", "compressed-tensors"): _Reading(("ignore",), exact_or_regex, _BOTH, "first"),
    ("vllm", "fp8"): _Reading(_LISTS, _exact, _BOTH, "containing"),
    ("vllm", "awq"): _Reading(("modules_to_not_convert",), _substring, _BOTH),
    ("vllm", "gptq"): _Reading(("dynamic",), _negative),
    ("sglang", "compressed-tensors"): _Reading(("ignore",), _suffix_or_regex, _QKV),
    ("sglang", "w8a8_int8"): _Reading(("ignore",), _suffix_or_regex, _QKV),
    ("sglang", "fp8"): _Reading(_LISTS, _dotted, _BOTH),
    ("sglang", "blockwise_int8"): _Reading(("ignored_layers",), _dotted, _BOTH, "never"),
    ("sglang", "awq"): _Reading(("modules_to_not_convert",), _substring),
    ("sglang", "gptq"): _Reading(("dynamic",), _negative),
    ("transformers", "compressed-tensors"): _Reading(("ignore",), exact_or_regex, _BOTH, "inferred"),
    ("transformers", "fp8"): _Reading(_LISTS[::-1], _boundary, _BOTH),
    ("lmdeploy", "fp8"): _Reading(_LISTS, _contained, _BOTH, "each"),
}


class Matcher:
    """What one engine takes each module for, under one `quantization_config`.

    Args:
        engine: a name in `data.ENGINES`.
        quantization_config: as in `config.json`.
        mtp_layer: number of the MTP layer, which SGLang calls `model.decoder`.
        fuses_q_a: whether the model has a `q_a_proj` to be fused with `kv_a_proj_with_mqa`.
    """

    def __init__(
        self,
        engine: str,
        quantization_config: Mapping[str, Any],
        *,
        mtp_layer: int | None = None,
        fuses_q_a: bool = True,
    ) -> None:
        self._family = ENGINES[engine].family
        self._method = str(quantization_config.get("quant_method")).removesuffix("_marlin")
        self._reading = _READINGS.get((self._family, self._method))
        self._schemes = declared_schemes(quantization_config)
        self._fuses_q_a = fuses_q_a
        self._rename = ("", "")
        entries = self._entries(quantization_config)
        if self._family == "sglang" and mtp_layer is not None:
            self._rename = (f"model.layers.{mtp_layer}", "model.decoder")
            entries = tuple(entry.replace(*self._rename) for entry in entries)
        self.entries = entries
        packed = table(quantization_config.get("packed_modules_mapping"))
        self._packed = packed.keys() if self._family == "sglang" else set()

    def __call__(self, module: str) -> Answer:
        """Returns the scheme that the engine expects of a module, None if none.

        Raises:
            re.error: an entry of the list is not a pattern; the engine would stop, too.
        """
        if not self._schemes:
            return None
        expert = _EXPERT.fullmatch(module)
        if expert is not None:
            return self._of_expert(self._renamed(expert[1]), self._renamed(module))
        parent, _, last = self._renamed(module).rpartition(".")
        return self._of_linear(parent, last)

    def _entries(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        if self._reading is None:
            return ()
        for key in self._reading.keys:
            value = config.get(key)
            if isinstance(value, Mapping):
                return tuple(value)
            if found := strings(value):
                return found
        return ()

    def _renamed(self, name: str) -> str:
        old, new = self._rename
        if old and (name == old or name.startswith(old + ".")):
            return new + name[len(old) :]
        return name

    def _of_linear(self, parent: str, last: str) -> Answer:
        members = _FUSED.get(last, ())
        if members[:1] == ("q_a_proj",) and not self._fuses_q_a:
            members = ()
        fused_names = _FUSED_NAMES.get(self._family, {})
        if not members or members[0] not in fused_names:
            return self._agree([f"{parent}.{last}".removeprefix(".")])
        fused = f"{parent}.{fused_names[members[0]]}"
        reading = self._reading
        expands = reading is not None and (
            members[0] in reading.unfused or fused_names[members[0]] in self._packed
        )
        if not expands or (self._method == "compressed-tensors" and fused in self.entries):
            return self._agree([fused], also=[f"{parent}.{m}" for m in members])
        return self._agree([f"{parent}.{m}" for m in members])

    def _of_expert(self, layer: str, module: str) -> Answer:
        how = self._reading.experts if self._reading is not None else "never"
        if how == "inferred":
            return INFERRED
        if how == "never":
            return self._scheme([module])
        if how == "containing":
            listed = any("experts" in entry and layer in entry for entry in self.entries)
            return None if listed else self._scheme([module])
        if how == "first":
            return self._agree([f"{layer}.0.{p}_proj" for p in ("gate", "up", "down")])
        return self._agree([module if how == "each" else layer], also=[f"{layer}.0.gate_proj"])

    def _agree(self, names: Sequence[str], *, also: Sequence[str] = ()) -> Answer:
        """Returns what the names have in common; `also` are names that targets may give, too."""
        answers = {self._ignores(name) for name in names}
        if len(answers) > 1:
            return SPLIT
        if answers.pop():
            return None
        return self._scheme([*names, *also])

    def _ignores(self, name: str) -> bool:
        reading = self._reading
        if reading is None:
            return False
        if reading.test is _exact and self._family == "vllm" and "experts" in name:
            return any("experts" in entry and name in entry for entry in self.entries) or name in self.entries
        return reading.test(name, self.entries)

    def _scheme(self, names: Iterable[str]) -> Answer:
        """Returns the scheme whose targets name the module, or else that of all linears."""
        if self._method != "compressed-tensors":
            return self._schemes[0]
        every = list(names)
        for scheme in self._schemes:
            if any(exact_or_regex(name, scheme.targets) for name in every):
                return scheme
        return next((s for s in self._schemes if any(_is_class(t) for t in s.targets)), None)


def _is_class(target: str) -> bool:
    """Whether a target is the name of all linears' class."""
    return target in ("Linear", "LinearBase")


def is_ignored(
    engine: str, quantization_config: Mapping[str, Any], module: str, *, mtp_layer: int | None = None
) -> bool:
    """Whether an engine leaves a module unquantized under this `quantization_config`.

    Example:
        >>> ignore = {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["o_proj"]}
        >>> name = "model.layers.0.self_attn.o_proj"
        >>> is_ignored("vllm", ignore, name), is_ignored("sglang", ignore, name)
        (False, True)

    Args:
        engine: a name in `data.ENGINES`.
        quantization_config: as in `config.json`.
        module: a full name in the checkpoint, such as "model.layers.3.mlp.experts.7.down_proj".
        mtp_layer: number of the MTP layer, which SGLang knows under another name.
    """
    return Matcher(engine, quantization_config, mtp_layer=mtp_layer)(module) is None
