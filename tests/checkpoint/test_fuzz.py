"""Random damage to headers, indexes and configs: parsed or refused, never another exception.

A header that is accepted must also be accepted by safetensors' own parser, with the same tensors.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable, Iterable, Iterator

import pytest
from safetensors import SafetensorError, deserialize

from dsv3_tools.checkpoint import header
from dsv3_tools.checkpoint.config import ModelConfig, encode_config, parse_config
from dsv3_tools.checkpoint.header import encode_header, parse_header
from dsv3_tools.checkpoint.index import encode_index, is_shard_name, parse_index
from dsv3_tools.checkpoint.manifest import encode_manifest, parse_manifest
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import CheckpointError, HeaderError

NUM_HEADERS, NUM_INDEXES, NUM_CONFIGS, NUM_MANIFESTS = 200_000, 10_000, 10_000, 5_000

TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b'""', b"{}", b"[]", b" ", b"\n", b"\t", b"\0", b"\\", b"/"),
    *(b"0", b"1", b"-", b"-0", b"-1", b"1.0", b"1e3", b"1e999", b"4", b"8", b"12", b"16", b"255", b"65536"),
    *(b"9223372036854775807", b"9223372036854775808", b"18446744073709551615", b"1" * 5000),
    *(b"true", b"false", b"null", b"NaN", b"Infinity", b"-Infinity"),
    *(
        b"F32",
        b"BF16",
        b"F4",
        b"F8_E4M3",
        b"I64",
        b"U8",
        b"BOOL",
        b"F16",
        b"dtype",
        b"shape",
        b"data_offsets",
    ),
    *(b"__metadata__", b"format", b"weight_map", b"model_type", b".safetensors", b"../", b"..", b"/etc/x"),
    *(b"\\u0000", b"\\u001b[31m", b"\\ud800", b"\\udfff", b"\\ud83d\\ude00", b"\\n", b"\xff", b"\xc3\xa9"),
    *(b'"a":', b'"b":', b"[0,4]", b"[0]", b"[-0,0]", b"[" * 70, b'{"a":' * 70, b"[" * 2000, b"\xef\xbb\xbf"),
]


def mutations(seed: int, texts: list[bytes], number: int) -> Iterator[bytes]:
    """Yields `number` texts, each one of `texts` with one to four random edits."""
    chance = random.Random(seed)
    pick, below = chance.choice, chance.randrange
    for _ in range(number):
        text = pick(texts)
        for _ in range(pick((1, 1, 1, 2, 2, 3, 4))):
            at = below(len(text) + 1)
            end = min(len(text), at + pick((0, 1, 1, 2, 3, 8)))
            kind = below(6)
            if kind == 0 and at < len(text):
                text = text[:at] + bytes([text[at] ^ 1 << below(8)]) + text[at + 1 :]
            elif kind == 1:
                text = text[:at] + text[end:]
            elif kind == 2:
                text = text[:at] + pick(TOKENS) + text[end:]
            elif kind == 3:
                text = text[:at] + text[at : at + below(80)] + text[at:]
            else:  # where JSON stays JSON: a whole token is replaced by another
                old, new = pick(TOKENS), pick(TOKENS)
                where = text.find(old, at) if old in text else -1
                text = text[:where] + new + text[where + len(old) :] if where >= 0 else text
        yield text


def make_headers() -> tuple[list[bytes], int]:
    """Returns headers of different tensors that take up equally many bytes, and that number."""
    specs = [
        {"a": TensorSpec("F32", (4,)), "b": TensorSpec("U8", (2, 4)), "c": TensorSpec("BF16", (4,))},
        {"a": TensorSpec("I64", (2,)), "b": TensorSpec("F8_E4M3", (16,)), "e": TensorSpec("F32", (0, 4))},
        {
            "a.weight": TensorSpec("F4", (16,)),
            "a": TensorSpec("U8", (8, 1, 2, 1)),
            "b": TensorSpec("F64", ()),
        },
        {"a": TensorSpec("BOOL", (32,))},
    ]
    headers = []
    for names in specs:
        encoded, _ = encode_header(names)
        headers.append(encoded[8:].rstrip())
        headers.append(headers[-1].replace(b'"__metadata__":{"format":"pt"},', b""))
    return headers, 32


def compare_with_safetensors(text: bytes, payload: bytes) -> bool:
    """Returns whether the header is accepted; fails where safetensors does not agree with that."""
    try:
        ours = parse_header(text, 8 + len(text) + len(payload), "x")
    except HeaderError as error:
        assert str(error).isprintable()  # noqa: PT017 - one line, and nothing that moves the cursor
        return False
    theirs = deserialize(struct.pack("<Q", len(text)) + text + payload)
    start = 8 + len(text)
    assert {name: (spec.dtype, list(spec.shape)) for name, spec in ours.specs.items()} == {
        name: (tensor["dtype"], tensor["shape"]) for name, tensor in theirs
    }
    for name, tensor in theirs:
        begin = ours.offsets[name] - start
        assert payload[begin : begin + ours.specs[name].nbytes] == bytes(tensor["data"])
    return True


def compare_all(texts: Iterable[bytes], payload: bytes) -> int:
    """Returns how many of the headers are accepted."""
    return sum(compare_with_safetensors(text, payload) for text in texts)


def test_headers() -> None:
    texts, nbytes = make_headers()
    payload = bytes(range(nbytes))
    assert compare_all(texts, payload) == len(texts)

    accepted = compare_all(mutations(1, texts, NUM_HEADERS), payload)

    assert accepted > NUM_HEADERS // 50, "the mutations are so coarse that little is compared"
    assert accepted < NUM_HEADERS // 2


@pytest.mark.parametrize("weaken", ["sizes", "minus zero", "surrogates", "overflow"])
def test_control_a_weaker_parser_is_found_out(weaken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, nbytes = make_headers()
    if weaken == "sizes":
        monkeypatch.setattr(header, "_is_sizes", lambda value: isinstance(value, list))
    elif weaken == "minus zero":
        monkeypatch.setattr(header, "load_json", lambda text, _: _as_header_error(json.loads, text))
    elif weaken == "surrogates":
        monkeypatch.setattr(header, "_ESCAPED_SURROGATE", header.re.compile(rb"never"))
        texts = [b'{"__metadata__":{"format":"\\ud83d\\ude00"},' + texts[1][1:]]
    else:
        monkeypatch.setattr(header, "accumulate", lambda *_: [0])
        texts = [b'{"a":{"dtype":"U8","shape":[9223372036854775807,255,0],"data_offsets":[0,0]}}']
        nbytes = 0
    with pytest.raises((SafetensorError, AssertionError, TypeError)):
        compare_all(mutations(2, texts, 50_000), bytes(range(nbytes)))


def _as_header_error(load: Callable[[bytes], object], text: bytes) -> object:
    try:
        return load(text)
    except (ValueError, RecursionError):
        raise HeaderError("x: no") from None


def test_indexes() -> None:
    weight_map = {"model.norm.weight": "model-00001-of-000002.safetensors", "lm_head.weight": "b.safetensors"}
    texts = [
        encode_index(weight_map, total_size=10, total_parameters=5),
        b'{"weight_map":{"a":"a.safetensors"}}',
    ]
    accepted = 0
    for text in mutations(3, texts, NUM_INDEXES):
        try:
            parsed = parse_index(text, "index")
        except CheckpointError as error:
            assert str(error).isprintable()  # noqa: PT017
            continue
        accepted += 1
        assert parsed
        assert all(is_shard_name(shard) and "/" not in shard for shard in parsed.values())
        again = encode_index(parsed, total_size=0, total_parameters=0)
        assert parse_index(again, "again") == parsed
    assert NUM_INDEXES // 50 < accepted < NUM_INDEXES * 3 // 4


def test_configs() -> None:
    texts = [encode_config(preset) for preset in PRESETS.values()]
    required = PRESETS["deepseek-v3"].keys() & set(ModelConfig.__slots__)
    texts.append(encode_config({key: PRESETS["deepseek-v3"][key] for key in sorted(required)}))
    parsed_only = accepted = 0
    for text in mutations(4, texts, NUM_CONFIGS):
        try:
            document = parse_config(text)
            parsed_only += 1
            assert parse_config(encode_config(document)) == document
            config = ModelConfig.from_dict(document)
        except CheckpointError as error:
            assert str(error).isprintable()  # noqa: PT017
            continue
        accepted += 1
        assert config.hidden_size >= 1
        assert config.mtp_layers.start == config.num_hidden_layers
    assert NUM_CONFIGS // 50 < accepted < parsed_only < NUM_CONFIGS


def test_manifests() -> None:
    text = encode_manifest({"files": {"a.safetensors": {"sha256": "0" * 64, "nbytes": 4}}, "version": "0.1"})
    for damaged in mutations(5, [text], NUM_MANIFESTS):
        if damaged != text:
            with pytest.raises(CheckpointError):
                parse_manifest(damaged, "manifest")
    assert parse_manifest(text, "manifest")["version"] == "0.1"


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' * 4_000_000,
        b"[" * 20_000_000,
        b'{"a":[' + b"0," * 10_000_000 + b"0]}",
        b'{"a":"' + b"x" * 24_000_000 + b'"}',
        b'{"a":' + b"1" * 24_000_000 + b"}",
    ],
    ids=["objects", "lists", "numbers", "text", "digits"],
)
def test_headers_of_25_mb_are_refused_soon(text: bytes) -> None:
    start = time.process_time()
    with pytest.raises(HeaderError) as caught:
        parse_header(text, 8 + len(text), "x")
    assert time.process_time() - start < 2.0
    assert len(str(caught.value)) < 1000
