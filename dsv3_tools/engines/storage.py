"""How one module's weight is stored, told from the names, dtypes and shapes of its tensors alone.

Layouts: the released FP8 checkpoint (`README_WEIGHTS.md`), compressed-tensors 0.20
(`compressors/pack_quantized`, `compressors/int_quantized`), GPTQModel 7.7, AutoAWQ's GEMM order,
TensorRT-LLM's W4A8 (`examples/quantization/quantize_mixed_precision_moe.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from dsv3_tools.checkpoint.dtypes import FLOAT_DTYPES
from dsv3_tools.checkpoint.specs import TensorSpec

__all__ = ["BLOCK", "PACK", "Signature", "Storage", "storage_of"]

Signature = tuple[tuple[str, TensorSpec], ...]
"""A module's tensors: name after the module's, and spec; sorted by name."""

BLOCK = 128
"""Rows and columns of a block where `quantization_config` says nothing else."""

PACK = 8
"""Four-bit numbers in an int32."""

_NEEDED = {
    "fp8-block": {"weight", "weight_scale_inv"},
    "fp8-ct-block": {"weight", "weight_scale"},
    "fp8-ct-channel": {"weight", "weight_scale"},
    "int8-block": {"weight", "weight_scale_inv"},
    "int8-channel": {"weight", "weight_scale"},
    "int4-ct": {"weight_packed", "weight_scale", "weight_shape"},
    "gptq": {"qweight", "qzeros", "scales", "g_idx"},
    "awq": {"qweight", "qzeros", "scales"},
    "w4afp8": {"weight", "weight_scale_inv"},
}
_ALLOWED = {
    "int4-ct": {"weight_zero_point", "weight_g_idx"},
    "int8-channel": {"weight_offset"},
    "w4afp8": {"input_scale"},
}


@dataclass(frozen=True, slots=True)
class Storage:
    """One module's storage.

    Attributes:
        format: "dense", a format of `engine.FORMATS`, "fp8-bare" or "int8-bare" for codes without any
            scale, or "unknown".
        shape: the weight's own shape, `[out, in]`, whatever its packing; None if it cannot be told.
        group_size: inputs that share a scale, for formats that have groups.
        signature: the tensors.
    """

    format: str
    shape: tuple[int, ...] | None
    group_size: int | None
    signature: Signature

    @property
    def is_quantized(self) -> bool:
        """Whether the weight's numbers mean nothing without a scale."""
        return self.format != "dense"

    def part(self, name: str) -> TensorSpec | None:
        """Returns the spec of one of the module's tensors, if it is there."""
        return next((spec for found, spec in self.signature if found == name), None)

    @property
    def missing(self) -> list[str]:
        """Tensors that the format needs and that are not there."""
        found = {name for name, _ in self.signature}
        if self.format.endswith("-bare"):
            return ["weight_scale_inv" if self.format == "fp8-bare" else "weight_scale"]
        return sorted(_NEEDED.get(self.format, set()) - found)

    @property
    def orphans(self) -> list[str]:
        """Scales and other quantization tensors that the format does not have."""
        known = _NEEDED.get(self.format, {"weight"}) | _ALLOWED.get(self.format, set())
        every = set().union(*_NEEDED.values(), *_ALLOWED.values())
        return sorted(name for name, _ in self.signature if name in every - known)

    def misshapen(self, block: tuple[int, int] = (BLOCK, BLOCK)) -> Iterator[tuple[str, TensorSpec, str]]:
        """Yields each tensor whose shape does not fit the weight: its name, spec, and expected shape."""
        for name, expected in _expected_shapes(self, block).items():
            spec = self.part(name)
            if spec is not None and spec.shape not in expected:
                yield name, spec, " or ".join(str(list(shape)) for shape in expected)


@lru_cache(maxsize=1 << 16)
def storage_of(signature: Signature, logical: tuple[int, ...] | None) -> Storage:
    """Returns how a module is stored; `logical` is its weight's shape according to `config.json`."""
    parts = dict(signature)
    codes = parts.get("weight_packed") or parts.get("qweight")
    if codes is not None and codes.dtype != "I32":
        return Storage("unknown", None, None, signature)
    if "weight_packed" in parts:
        return _packed(signature, parts)
    if "qweight" in parts:
        return _transposed(signature, parts, logical)
    weight = parts.get("weight")
    if weight is None:
        return Storage("unknown", None, None, signature)
    if weight.dtype in FLOAT_DTYPES:
        return Storage("dense", weight.shape, None, signature)
    if weight.dtype == "F8_E4M3":
        return Storage(_fp8(parts), weight.shape, None, signature)
    if weight.dtype == "I8":
        return _int8(signature, parts, logical)
    return Storage("unknown", weight.shape, None, signature)


def _fp8(parts: dict[str, TensorSpec]) -> str:
    if "weight_scale_inv" in parts:
        return "fp8-block"
    if (scale := parts.get("weight_scale")) is None:
        return "fp8-bare"
    rows = parts["weight"].shape[0] if parts["weight"].shape else 0
    is_block = len(scale.shape) == 2 and (scale.shape[1] > 1 or scale.shape[0] not in (1, rows))
    return "fp8-ct-block" if is_block else "fp8-ct-channel"


def _int8(signature: Signature, parts: dict[str, TensorSpec], logical: tuple[int, ...] | None) -> Storage:
    weight, scale = parts["weight"], parts.get("weight_scale_inv")
    if scale is None:
        name = "int8-channel" if "weight_scale" in parts else "int8-bare"
        return Storage(name, weight.shape, None, signature)
    halved = logical is not None and weight.shape == (logical[0], logical[-1] // 2)
    if len(weight.shape) == 2 and (halved or (logical is None and scale.shape[:1] == weight.shape[:1])):
        shape = (weight.shape[0], weight.shape[1] * 2)
        return Storage("w4afp8", shape, _group(shape[1], scale.shape[-1:]), signature)
    return Storage("int8-block", weight.shape, None, signature)


def _packed(signature: Signature, parts: dict[str, TensorSpec]) -> Storage:
    packed, scale = parts["weight_packed"], parts.get("weight_scale")
    shape = (packed.shape[0], packed.shape[1] * PACK) if len(packed.shape) == 2 else None
    group = _group(shape[1], scale.shape[1:]) if shape is not None and scale is not None else None
    return Storage("int4-ct", shape, group, signature)


def _transposed(
    signature: Signature, parts: dict[str, TensorSpec], logical: tuple[int, ...] | None
) -> Storage:
    """GPTQ packs along the inputs, AWQ along the outputs; both store `[in, out]`."""
    codes, scales = parts["qweight"], parts.get("scales")
    if len(codes.shape) != 2:
        return Storage("unknown", None, None, signature)
    rows, columns = codes.shape
    outputs = scales.shape[-1] if scales is not None and scales.shape else (logical or (columns,))[0]
    name = "awq" if outputs == columns * PACK and "g_idx" not in parts else "gptq"
    shape = (columns * PACK, rows) if name == "awq" else (columns, rows * PACK)
    group = _group(shape[1], scales.shape[:1]) if scales is not None else None
    return Storage(name, shape, group, signature)


def _group(inputs: int, counts: tuple[int, ...]) -> int | None:
    """Returns how many inputs each of `counts` groups has, if they divide."""
    if len(counts) != 1 or counts[0] < 1 or inputs % counts[0]:
        return None
    return inputs // counts[0]


def _expected_shapes(storage: Storage, block: tuple[int, int]) -> dict[str, list[tuple[int, ...]]]:
    if storage.shape is None or len(storage.shape) != 2:
        return {}
    rows, columns = storage.shape
    blocks = (-(-rows // block[0]), -(-columns // block[1]))
    group = storage.group_size
    groups = columns // group if group else 0
    table: dict[str, dict[str, list[tuple[int, ...]]]] = {
        "fp8-block": {"weight_scale_inv": [blocks]},
        "int8-block": {"weight_scale_inv": [blocks]},
        "fp8-ct-block": {"weight_scale": [blocks]},
        "fp8-ct-channel": {"weight_scale": [(rows, 1), (rows,), (1,), ()]},
        "int8-channel": {"weight_scale": [(rows, 1)], "weight_offset": [(rows, 1)]},
        "int4-ct": {
            "weight_scale": [(rows, groups)],
            "weight_shape": [(2,)],
            "weight_zero_point": [(rows // PACK, groups)],
        },
        "gptq": {"scales": [(groups, rows)], "qzeros": [(groups, rows // PACK)], "g_idx": [(columns,)]},
        "awq": {"scales": [(groups, rows)], "qzeros": [(groups, rows // PACK)]},
        "w4afp8": {"weight_scale_inv": [(rows, groups)]},
    }
    return table.get(storage.format, {})
