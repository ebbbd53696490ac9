"""`dsv3_manifest.json`: the SHA-256 of every file of a result, and of the manifest itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dsv3_tools.checkpoint.header import load_json
from dsv3_tools.errors import CheckpointError, HeaderError

__all__ = [
    "FIGURES_NAME",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "MAX_QUANTIZATION_BYTES",
    "PUSH_NAME",
    "QUANTIZATION_NAME",
    "encode_manifest",
    "manifest_sha256",
    "parse_manifest",
]

MANIFEST_NAME = "dsv3_manifest.json"
MAX_MANIFEST_BYTES = 50_000_000

FIGURES_NAME = "dsv3_figures.json"
PUSH_NAME = "dsv3_push.json"
"""Figures of `dsv3 verify`, for the model card; of this result alone, and in no manifest."""

QUANTIZATION_NAME = "dsv3_quantization.json"
"""What calibration has gained; in the manifest of a result that has it."""

MAX_QUANTIZATION_BYTES = 200_000_000
"""That of a released model has figures of 30,000 matrices."""

_OWN_HASH = "manifest_sha256"


def encode_manifest(document: Mapping[str, Any]) -> bytes:
    """Returns the manifest's text; its last key is the SHA-256 of all the others."""
    return _text({**document, _OWN_HASH: manifest_sha256(document)})


def manifest_sha256(document: Mapping[str, Any]) -> str:
    """Returns the SHA-256 that a manifest states of itself."""
    return hashlib.sha256(_text(document)).hexdigest()


def parse_manifest(text: bytes, where: str) -> dict[str, Any]:
    """Returns a manifest whose text is exactly what `encode_manifest` wrote.

    Raises:
        CheckpointError: the manifest itself has been changed or damaged.
    """
    try:
        document = load_json(text, where)
    except HeaderError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict):
        raise CheckpointError(f"{where}: not a manifest of dsv3-tools")
    digest = document.pop(_OWN_HASH, None)
    if manifest_sha256(document) != digest or encode_manifest(document) != text:
        raise CheckpointError(f"{where}: does not have the SHA-256 that it states of itself; it was changed")
    return document


def _text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
