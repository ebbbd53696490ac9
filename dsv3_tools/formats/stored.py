"""Which weights a checkpoint stores, in which format, as which tensors.

`config.json` says which formats there are; names and dtypes say which weight has which. A weight is FP8
because its dtype says so, never because an element has one byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dsv3_tools.checkpoint.dtypes import FLOAT_DTYPES
from dsv3_tools.checkpoint.names import TensorName, parse_name
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import compressed_tensors
from dsv3_tools.formats.base import Format
from dsv3_tools.formats.dense import Dense
from dsv3_tools.formats.fp8_block import FP8Block
from dsv3_tools.formats.int4 import is_group_size
from dsv3_tools.formats.int4_transposed import INT4AWQ, INT4GPTQ
from dsv3_tools.formats.int8 import INT8Block, INT8Channel

__all__ = ["Stored", "StoredWeight", "find_weights", "read_formats"]

PLAIN_PARAMETERS = frozenset({"weight", "bias", "e_score_correction_bias", "inv_freq"})
"""Last parts of the names of tensors that may be stored as they are."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight, or another tensor that is stored as it is.

    Attributes:
        name: its own name, taken apart; `parameter` is that of the model ("weight", "bias").
        shape: shape of the weight.
        format: how it is stored; `Dense` for whatever is not quantized.
        parts: tensor name of every part.
    """

    name: TensorName
    shape: tuple[int, ...]
    format: Format
    parts: Mapping[str, str]

    @property
    def full_name(self) -> str:
        """Its tensor name in an unquantized checkpoint."""
        return f"{self.name.prefix}.{self.name.parameter}"

    @property
    def code_name(self) -> str:
        """The name of the tensor with its elements or codes."""
        return self.parts[self.format.weight_part]


@dataclass(frozen=True)
class Stored:
    """Everything that a checkpoint stores.

    Attributes:
        weights: weights and other parameters in the checkpoint's order.
        refused: tensors that belong to none, with what is wrong with them.
        misstored: those of them that have the name of a parameter, but not as it can be stored.
    """

    weights: tuple[StoredWeight, ...]
    refused: Mapping[str, str]
    misstored: Mapping[str, TensorSpec]

    @cached_property
    def logical(self) -> dict[str, TensorSpec]:
        """Names and shapes of the parameters as an unquantized checkpoint would have them."""
        known = {w.full_name: TensorSpec(w.format.code_dtype, w.shape) for w in self.weights}
        return {**self.misstored, **known}


def read_formats(config_json: Mapping[str, Any], where: str) -> tuple[Format, ...]:
    """Returns the formats of quantized weights that a `config.json` states; none without a key.

    Raises:
        FormatError: a quantization that is not known here.
    """
    config = config_json.get("quantization_config")
    if config is None:
        return ()
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method == "fp8":
        return (FP8Block.from_quantization_config(config, where),)
    if method == "blockwise_int8":
        return (INT8Block.from_quantization_config(config, where),)
    if method == compressed_tensors.METHOD:
        return compressed_tensors.read_formats(config, where)
    if method == "w8a8_int8":
        return (INT8Channel(),)
    if method == "gptq":
        return (_read_gptq(config, where),)
    if method == "awq":
        return (_read_awq(config, where),)
    raise FormatError(
        f"{where}: quantization is {str(method)[:100]!r}, expected one of 'fp8', 'blockwise_int8', "
        f"'{compressed_tensors.METHOD}', 'w8a8_int8', 'gptq', 'awq'"
    )


def find_weights(specs: Mapping[str, TensorSpec], formats: Sequence[Format]) -> Stored:
    """Returns what the tensors of `specs` store, given the formats that quantized weights may have."""
    by_codes: dict[tuple[str, str], list[Format]] = {}
    for fmt in formats:
        by_codes.setdefault((fmt.weight_part, fmt.code_dtype), []).append(fmt)
    others: dict[str, list[Format]] = {}
    for fmt in formats:
        for part in fmt.part_names:
            if part != fmt.weight_part:
                others.setdefault(part, []).append(fmt)
    weights: list[StoredWeight] = []
    refused: dict[str, str] = {}
    for name, spec in specs.items():
        parsed = parse_name(name)
        if parsed is None:
            refused[name] = "is not a tensor of this family"
        elif candidates := by_codes.get((parsed.parameter, spec.dtype)):
            try:
                weights.append(_quantized(parsed, spec, specs, candidates))
            except FormatError as error:
                refused[name] = f"({spec}): {error}"
        elif parsed.parameter in PLAIN_PARAMETERS and spec.dtype in FLOAT_DTYPES:
            weights.append(StoredWeight(parsed, spec.shape, Dense(spec.dtype), {"weight": name}))
        elif parsed.parameter in others:
            refused |= _orphan(name, parsed, others[parsed.parameter], specs)
        else:
            refused[name] = f"({spec}) is neither a quantized weight nor an unquantized tensor"
    misstored = {name: specs[name] for name in refused if _has_parameter_name(name)}
    return Stored(tuple(weights), refused, misstored)


def _has_parameter_name(name: str) -> bool:
    parsed = parse_name(name)
    return parsed is not None and parsed.parameter in PLAIN_PARAMETERS


def _quantized(
    parsed: TensorName, spec: TensorSpec, specs: Mapping[str, TensorSpec], candidates: Sequence[Format]
) -> StoredWeight:
    """Returns the weight in the format that its parts satisfy, or else in the first of all.

    Of several that they satisfy, the one with the most parts: zero points tell asymmetric weights apart.
    """
    found = [_as_stored(parsed, spec, specs, fmt) for fmt in candidates]
    if len(found) == 1:
        return found[0]
    satisfied = [weight for weight in found if _is_satisfied(weight, specs)]
    return max(satisfied, key=lambda weight: len(weight.parts)) if satisfied else found[0]


def _is_satisfied(weight: StoredWeight, specs: Mapping[str, TensorSpec]) -> bool:
    try:
        expected = weight.format.parts(weight.shape)
    except FormatError:
        return False
    return all(specs.get(name) == expected[part] for part, name in weight.parts.items())


def _as_stored(
    parsed: TensorName, spec: TensorSpec, specs: Mapping[str, TensorSpec], fmt: Format
) -> StoredWeight:
    parts = {part: f"{parsed.prefix}.{part}" for part in fmt.part_names}
    fitted = fmt.fitted({part: specs[name] for part, name in parts.items() if name in specs})
    return StoredWeight(replace(parsed, parameter="weight"), fitted.shape_of(spec.shape), fitted, parts)


def _orphan(
    name: str, parsed: TensorName, formats: Sequence[Format], specs: Mapping[str, TensorSpec]
) -> dict[str, str]:
    """Returns what is wrong with a part of one of `formats` without codes beside it; nothing if it has."""
    problem = "is there but its weight is missing"
    for fmt in formats:
        spec = specs.get(f"{parsed.prefix}.{fmt.weight_part}")
        if spec is None:
            continue
        if spec.dtype == fmt.code_dtype:
            return {}
        problem = f"is there but its weight is {spec}, expected {fmt.code_dtype}"
    return {name: problem}


def _read_gptq(config: Mapping[str, Any], where: str) -> INT4GPTQ:
    bits, size, packed_in = config.get("bits"), config.get("group_size"), config.get("pack_dtype", "int32")
    written = config.get("checkpoint_format", "gptq")
    if bits != 4 or packed_in != "int32" or not is_group_size(size) or written not in ("gptq", "gptq_v2"):
        raise FormatError(
            f"{where}: GPTQ with {bits!r} bits in {packed_in!r}, group_size {size!r}, checkpoint_format "
            f"{written!r}; expected 4 bits in 'int32', a multiple of 8 or -1, and 'gptq' or 'gptq_v2'"
        )
    act_order, version = config.get("desc_act") is True, 1 if written == "gptq" else 2
    return INT4GPTQ(size, config.get("sym", True) is True, version=version, act_order=act_order)


def _read_awq(config: Mapping[str, Any], where: str) -> INT4AWQ:
    bits = config.get("bits", config.get("w_bit"))
    size = config.get("group_size", config.get("q_group_size"))
    version, zero_point = str(config.get("version", "gemm")).lower(), config.get("zero_point", True)
    if bits != 4 or not is_group_size(size) or version != "gemm" or zero_point is not True:
        raise FormatError(
            f"{where}: AWQ with {bits!r} bits, group_size {size!r}, version {version!r}, zero_point "
            f"{zero_point!r}; expected 4 bits, a multiple of 8 or -1, 'gemm' and true"
        )
    return INT4AWQ(size, symmetric=False)
