"""The manifest vouches for itself: any change to it is noticed."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest

from dsv3_tools.checkpoint.manifest import encode_manifest, parse_manifest
from dsv3_tools.errors import CheckpointError

DOCUMENT: dict[str, Any] = {
    "tool": "dsv3-tools",
    "version": "0.1.0",
    "source": {"path": "/models/Größe \U0001f600", "options": {"to": "bf16", "jobs": None, "ratio": 1.5}},
    "files": {
        f"model-{n:05d}-of-000003.safetensors": {
            "sha256": hashlib.sha256(bytes([n])).hexdigest(),
            "nbytes": n,
        }
        for n in (1, 2, 3)
    },
}
TEXT = encode_manifest(DOCUMENT)


def refuse(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^the/manifest: ") as caught:
        parse_manifest(text, "the/manifest")
    assert str(caught.value).isprintable()


def test_round_trip() -> None:
    assert parse_manifest(TEXT, "the/manifest") == DOCUMENT
    assert list(parse_manifest(TEXT, "the/manifest")) == list(DOCUMENT)
    assert list(json.loads(TEXT))[-1] == "manifest_sha256"
    assert encode_manifest(parse_manifest(TEXT, "")) == TEXT


def test_its_hash_is_that_of_the_text_without_it() -> None:
    text = json.dumps(DOCUMENT, indent=2, ensure_ascii=False) + "\n"
    assert json.loads(TEXT)["manifest_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_thousand_flipped_bits() -> None:
    chance = random.Random(7)
    places = chance.sample(range(len(TEXT) * 8), 1000)
    for place in places:
        damaged = bytearray(TEXT)
        damaged[place // 8] ^= 1 << place % 8
        refuse(bytes(damaged))


def test_other_changes() -> None:
    document = json.loads(TEXT)
    refuse(TEXT[:-1])
    refuse(TEXT + b"\n")
    refuse(b"\xef\xbb\xbf" + TEXT)
    refuse(json.dumps(document).encode())
    refuse(json.dumps(dict(reversed(document.items())), indent=2, ensure_ascii=False).encode() + b"\n")
    refuse(encode_manifest({**DOCUMENT, "extra": 1}).replace(b'  "extra": 1,\n', b""))
    refuse((json.dumps(DOCUMENT, indent=2, ensure_ascii=False) + "\n").encode())
    for other in (None, 5, "", "0" * 64, [document["manifest_sha256"]]):
        refuse(
            (json.dumps({**document, "manifest_sha256": other}, indent=2, ensure_ascii=False) + "\n").encode()
        )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"files":[]}',
        b'{"files":{"a":NaN}}',
        b'{"files":{"a":"\\ud800"}}',
        b'{"files":' + b"[" * 99 + b"]" * 99 + b"}",
    ],
)
def test_what_is_no_manifest(text: bytes) -> None:
    refuse(text)
