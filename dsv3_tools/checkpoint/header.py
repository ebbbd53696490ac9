"""The header of a safetensors file: parsed strictly, written as safetensors itself writes it.

Layout (safetensors' format description): 8 bytes little-endian length, that many bytes of JSON, then
the tensors' bytes without holes. This parser refuses some things that safetensors 0.8 lets through
and that have no honest use in a checkpoint: a name twice, unknown fields, leading spaces, empty names,
names with control characters or path parts.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import HeaderError

__all__ = [
    "MAX_HEADER_BYTES",
    "SAVE_METADATA",
    "Header",
    "check_tensor_name",
    "encode_header",
    "file_order",
    "load_json",
    "parse_header",
]

MAX_HEADER_BYTES = 25_000_000
"""The Hub's own parser stops here; safetensors stops at 100 MB."""

SAVE_METADATA = {"format": "pt"}
"""Metadata of every shard written: older transformers refuse a file without it."""

_MAX_DIMENSIONS = 8
_MAX_NUMBER = 2**63 - 1
_MAX_JSON_DEPTH = 64
_MINUS_ZERO = re.compile(rb"-0(?![.0-9eE])")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors: `specs` by name in file order, `offsets` from the start of the file."""

    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    nbytes: int

    @property
    def file_nbytes(self) -> int:
        """Bytes of the whole file that this header describes."""
        return self.nbytes + sum(spec.nbytes for spec in self.specs.values())


def file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Returns the names in the order in which safetensors writes them: by dtype rank, then name."""
    return sorted(specs, key=lambda name: (-DTYPES[specs[name].dtype].rank, name.encode()))


def encode_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, Header]:
    """Returns the header's bytes, equal to those of `safetensors.torch.save_file`, and the header.

    The tensors come in `file_order`, whatever the order of `specs`; the metadata is `SAVE_METADATA`.
    """
    entries: dict[str, Any] = {"__metadata__": SAVE_METADATA}
    ordered = file_order(specs)
    position = 0
    starts = {}
    for name in ordered:
        spec = specs[name]
        starts[name] = position
        end = position + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    encoded = struct.pack("<Q", len(text)) + text
    offsets = {name: len(encoded) + start for name, start in starts.items()}
    return encoded, Header({n: specs[n] for n in ordered}, offsets, SAVE_METADATA, len(encoded))


def parse_header(text: bytes, file_nbytes: int, where: str) -> Header:
    """Returns the header of a file of `file_nbytes` bytes from its JSON `text`.

    Raises:
        HeaderError: anything that is not exactly right, with `where` and the tensor.
    """
    if not text.startswith(b"{"):
        raise HeaderError(f"{where}: header starts with {text[:8]!r}, expected '{{'")
    entries = load_json(text, where)
    if not isinstance(entries, dict):
        raise HeaderError(f"{where}: header is {type(entries).__name__}, expected a JSON object")
    metadata = _parse_metadata(entries.pop("__metadata__", {}), where)
    parsed = [(name, *_parse_entry(name, entry, where)) for name, entry in entries.items()]
    parsed.sort(key=lambda item: (item[2], item[3], item[0]))
    start_of_data = 8 + len(text)
    specs, offsets, expected = {}, {}, 0
    for name, spec, begin, end in parsed:
        if begin != expected:
            kind = "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            raise HeaderError(f"{where}: tensor {name!r} starts at {begin}, expected {expected}: it {kind}")
        specs[name], offsets[name], expected = spec, start_of_data + begin, end
    if start_of_data + expected != file_nbytes:
        raise HeaderError(
            f"{where}: the file has {file_nbytes:,} bytes, its header describes "
            f"{start_of_data + expected:,} (truncated or extended file); fetch it again"
        )
    return Header(specs, offsets, metadata, start_of_data)


def load_json(text: bytes, where: str) -> Any:
    """Returns the JSON document in `text`, refusing what cannot be written back as the same JSON.

    That is: duplicate keys, NaN, numbers beyond float64, -0, unpaired surrogates, deep nesting.

    Raises:
        HeaderError: not strict JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice[:100]!r} stands twice")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def whole(digits: str) -> int:
        return int(digits) if digits != "-0" else refuse(digits)

    def real(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits[:20])

    try:
        document = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_int=whole if _MINUS_ZERO.search(text) else None,  # twice as fast without
            parse_float=real,
        )
        _check_depth(document)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise HeaderError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise HeaderError(f"{where}: not valid JSON: {error}") from None
    return document


def check_tensor_name(name: str, where: str) -> None:
    """Refuses a name that no tensor has and that could harm a terminal or a path.

    Raises:
        HeaderError: with `where` and the name, escaped.
    """
    hostile = not name or not name.isprintable() or "/" in name or "\\" in name or ".." in name
    if hostile or len(name) > 512:
        raise HeaderError(f"{where}: {name[:100]!r} cannot be the name of a tensor")


def _check_depth(document: Any) -> None:
    level: list[Any] = [[document]]
    for _ in range(_MAX_JSON_DEPTH + 1):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
    if level:
        raise ValueError(f"nested more than {_MAX_JSON_DEPTH} levels deep")


def _parse_metadata(metadata: Any, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{where}: __metadata__ must map strings to strings")
    return metadata


def _parse_entry(name: str, entry: Any, where: str) -> tuple[TensorSpec, int, int]:
    check_tensor_name(name, where)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{where}: tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"{where}: tensor {name!r} has the unknown dtype {str(dtype)[:100]!r}")
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise HeaderError(f"{where}: tensor {name!r} has the impossible shape {str(shape)[:100]}")
    if not _is_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise HeaderError(f"{where}: tensor {name!r} has the impossible data_offsets {str(span)[:100]}")
    spec = TensorSpec(dtype, tuple(shape))
    # Sizes are multiplied as in safetensors, where a zero at the end does not undo an overflow.
    largest = max(accumulate(shape, mul), default=1)
    if largest > _MAX_NUMBER or spec.num_elements * DTYPES[dtype].bits % 8:
        raise HeaderError(f"{where}: tensor {name!r} ({spec}) has an impossible size")
    if span[1] - span[0] != spec.nbytes:
        raise HeaderError(
            f"{where}: tensor {name!r} occupies {span[1] - span[0]:,} bytes, "
            f"expected {spec.nbytes:,} for {spec}"
        )
    return spec, span[0], span[1]


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_NUMBER for n in value)
