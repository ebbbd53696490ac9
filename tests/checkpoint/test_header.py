"""Headers: the same bytes as safetensors writes, and a stricter parser than its own."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from dsv3_tools.checkpoint import header
from dsv3_tools.checkpoint.dtypes import DTYPES, torch_dtype
from dsv3_tools.checkpoint.files import read_shard_header
from dsv3_tools.checkpoint.header import (
    MAX_HEADER_BYTES,
    check_tensor_name,
    encode_header,
    file_order,
    load_json,
    parse_header,
)
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import CheckpointError, HeaderError

TORCH_DTYPES = [name for name, dtype in DTYPES.items() if dtype.torch_name is not None]

NAMES = st.one_of(
    st.from_regex(
        r"model\.layers\.[0-9]{1,2}\.mlp\.experts\.[0-9]{1,3}\.(up|down)_proj\.weight", fullmatch=True
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
).filter(lambda name: name != "__metadata__")
SPECS = st.builds(
    TensorSpec, st.sampled_from(TORCH_DTYPES), st.lists(st.integers(0, 5), max_size=4).map(tuple)
)


def parse(text: bytes, payload: int = 0) -> header.Header:
    return parse_header(text, 8 + len(text) + payload, "shard")


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def refuse(text: bytes, payload: int, expected: str) -> None:
    with pytest.raises(HeaderError) as caught:
        parse(text, payload)
    message = str(caught.value)
    assert message.startswith("shard: ")
    assert message.isprintable()
    assert len(message) < 1500
    assert expected in message


# Against safetensors' own writer.


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(specs=st.dictionaries(NAMES, SPECS, max_size=8))
def test_the_bytes_are_those_of_save_file(tmp_path: Path, specs: dict[str, TensorSpec]) -> None:
    tensors = {
        name: torch.zeros(spec.nbytes, dtype=torch.uint8).view(torch_dtype(spec.dtype)).reshape(spec.shape)
        for name, spec in specs.items()
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = (tmp_path / "a.safetensors").read_bytes()

    encoded, made = encode_header(specs)

    assert encoded == file[: len(encoded)]
    assert made.file_nbytes == len(file)
    try:
        for name in specs:
            check_tensor_name(name, "")
    except HeaderError:  # safetensors writes names that the parser refuses
        return
    parsed = parse_header(file[8 : made.nbytes], len(file), "shard")
    assert parsed == made
    assert parsed.specs == specs
    assert list(parsed.specs) == file_order(specs)


def test_control_another_order_gives_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {"a": TensorSpec("U8", (1,)), "b": TensorSpec("F32", (1,))}
    right, _ = encode_header(specs)
    monkeypatch.setattr(header, "file_order", sorted)
    assert encode_header(specs)[0] != right


def test_offsets_point_at_the_tensors_of_save_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{n}": torch.randint(0, 256, (n % 7, 4), dtype=torch.uint8, generator=generator).view(dtype)
        for n, dtype in enumerate([torch.uint8, torch.float32, torch.bfloat16, torch.float8_e4m3fn] * 4)
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = (tmp_path / "a.safetensors").read_bytes()

    parsed = read_shard_header(tmp_path, "a.safetensors").header

    for name, tensor in tensors.items():
        start = parsed.offsets[name]
        expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert file[start : start + parsed.specs[name].nbytes] == expected
    assert parsed.metadata == {"format": "pt"}


def test_golden_bytes() -> None:
    encoded, _ = encode_header(
        {
            "model.layers.0.self_attn.o_proj.weight": TensorSpec("F8_E4M3", (2, 3)),
            "model.norm.weight": TensorSpec("BF16", (3,)),
            "model.layers.0.self_attn.o_proj.weight_scale_inv": TensorSpec("F32", (1, 1)),
        }
    )
    assert encoded == (
        b"\x30\x01\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"model.layers.0.self_attn.o_proj.weight_scale_inv":'
        b'{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
        b'"model.norm.weight":{"dtype":"BF16","shape":[3],"data_offsets":[4,10]},'
        b'"model.layers.0.self_attn.o_proj.weight":'
        b'{"dtype":"F8_E4M3","shape":[2,3],"data_offsets":[10,16]}} '
    )


def test_every_dtype_has_the_rank_and_size_that_safetensors_gives_it() -> None:
    assert len(DTYPES) == 22
    for name, dtype in DTYPES.items():
        text = json.dumps({"a": entry(dtype=name, shape=[8], data_offsets=[0, dtype.bits])}).encode()
        data = struct.pack("<Q", len(text)) + text + bytes(dtype.bits)
        assert deserialize(data)[0][1]["dtype"] == name
        with pytest.raises(SafetensorError):
            deserialize(data + b"\0")


# Everything that is wrong.

LEGAL = json.dumps({"a": entry()}).encode()
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'

WRONG_ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": (entry(extra=1), "exactly dtype, shape and data_offsets"),
    "no dtype": ({"shape": [2], "data_offsets": [0, 8]}, "exactly"),
    "no shape": ({"dtype": "F32", "data_offsets": [0, 8]}, "exactly"),
    "no offsets": ({"dtype": "F32", "shape": [2]}, "exactly"),
    "too long": (entry(shape=[1]), "occupies 8 bytes, expected 4"),
    "too short": (entry(shape=[3]), "occupies 8 bytes, expected 12"),
    "negative size": (entry(shape=[-2]), "impossible shape"),
    "two negative sizes": (entry(shape=[-1, -2]), "impossible shape"),
    "float size": (entry(shape=[2.0]), "impossible shape"),
    "bool size": (entry(shape=[2, True]), "impossible shape"),
    "text size": (entry(shape=["2"]), "impossible shape"),
    "null size": (entry(shape=[None]), "impossible shape"),
    "shape is a number": (entry(shape=2), "impossible shape"),
    "shape is an object": (entry(shape={"2": 2}), "impossible shape"),
    "nested shape": (entry(shape=[[2]]), "impossible shape"),
    "nine dimensions": (entry(shape=[2, 1, 1, 1, 1, 1, 1, 1, 1]), "impossible shape"),
    "huge size": (entry(shape=[2**64]), "impossible shape"),
    "product over 2**63": (entry(shape=[2**40, 2**40]), "impossible size"),
    "product over 2**63, then zero": (
        entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]),
        "impossible size",
    ),
    "half a byte": (entry(dtype="F4", shape=[3], data_offsets=[0, 2]), "impossible size"),
    "negative offset": (entry(data_offsets=[-8, 0]), "impossible data_offsets"),
    "float offset": (entry(data_offsets=[0.0, 8.0]), "impossible data_offsets"),
    "bool offset": (entry(shape=[0], data_offsets=[False, False]), "impossible data_offsets"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "impossible data_offsets"),
    "one offset": (entry(data_offsets=[8]), "impossible data_offsets"),
    "reversed offsets": (entry(data_offsets=[8, 0]), "impossible data_offsets"),
    "huge offset": (entry(data_offsets=[0, 2**80]), "impossible data_offsets"),
    "starts late": (entry(data_offsets=[4, 12]), "hole"),
    "unknown dtype": (entry(dtype="F7"), "unknown dtype 'F7'"),
    "dtype in lower case": (entry(dtype="f32"), "unknown dtype"),
    "dtype is a number": (entry(dtype=32), "unknown dtype"),
    "dtype is a list": (entry(dtype=["F32"]), "unknown dtype"),
    "dtype of a megabyte": (entry(dtype="F" * 1_000_000), "unknown dtype"),
}

WRONG_TEXTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "expected '{'"),
    "leading space": (b" " + LEGAL, "expected '{'"),
    "byte order mark": (b"\xef\xbb\xbf" + LEGAL, "expected '{'"),
    "a list": (b"[" + LEGAL + b"]", "expected '{'"),
    "a number": (b"8", "expected '{'"),
    "cut": (LEGAL[:-1], "not valid JSON"),
    "two documents": (LEGAL + LEGAL, "not valid JSON"),
    "trailing NUL": (LEGAL + b"\0", "not valid JSON"),
    "trailing comma": (LEGAL[:-1] + b",}", "not valid JSON"),
    "single quotes": (LEGAL.replace(b'"', b"'"), "not valid JSON"),
    "a comment": (LEGAL[:-1] + b"/* */}", "not valid JSON"),
    "not UTF-8": (LEGAL.replace(b"a", b"\xff", 1), "not valid JSON"),
    "NaN": (LEGAL.replace(b"[2]", b"[NaN]"), "NaN is not JSON"),
    "minus zero": (LEGAL.replace(b"[0,", b"[-0,"), "-0 is not JSON"),
    "beyond float64": (LEGAL.replace(b"[2]", b"[1e999]"), "1e999 is not JSON"),
    "number of 5000 digits": (LEGAL.replace(b"[2]", b"[" + b"1" * 5000 + b"]"), "not valid JSON"),
    "the same name twice": (f'{{"a":{EMPTY},"a":{EMPTY}}}'.encode(), "'a' stands twice"),
    "one field twice": (LEGAL.replace(b'"dtype"', b'"dtype":"F32","dtype"'), "'dtype' stands twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "stands twice"),
    "a long name twice": (
        b'{"' + b"a" * 100_000 + b'":1,"' + b"a" * 100_000 + b'":1}',
        "stands twice",
    ),
    "metadata is a list": (b'{"__metadata__":[]}', "__metadata__ must map"),
    "metadata is null": (b'{"__metadata__":null}', "__metadata__ must map"),
    "metadata holds a number": (b'{"__metadata__":{"a":1}}', "__metadata__ must map"),
    "metadata is nested": (b'{"__metadata__":{"a":{"b":"c"}}}', "__metadata__ must map"),
    "metadata with a surrogate": (b'{"__metadata__":{"a":"\\uDFFF"}}', "surrogates not allowed"),
    "entry is a list": (b'{"a":[]}', "exactly"),
    "entry is null": (b'{"a":null}', "exactly"),
    "nested 65 deep": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested"),
    "nested 100,000 deep": (b'{"a":' * 100_000, "nested too deeply"),
    "lists nested 100,000 deep": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
}


def test_control_the_legal_header_is_accepted() -> None:
    assert parse(LEGAL, 8).specs == {"a": TensorSpec("F32", (2,))}
    assert parse(LEGAL + b" \n\t ", 8).offsets == {"a": len(LEGAL) + 12}
    assert parse(b"{}").specs == {}
    assert parse(b'{"__metadata__":{"a":"\\u00e9"}}').metadata == {"a": "é"}


@pytest.mark.parametrize("case", WRONG_ENTRIES)
def test_wrong_entries(case: str) -> None:
    wrong, expected = WRONG_ENTRIES[case]
    refuse(json.dumps({"a": wrong}).encode(), 8, expected)
    # The message names the tensor also where it is one of many.
    many = {f"t{n}": entry(shape=[0], data_offsets=[0, 0]) for n in range(20)}
    refuse(json.dumps({**many, "culprit": wrong}).encode(), 8, "'culprit'")


@pytest.mark.parametrize("case", WRONG_TEXTS)
def test_wrong_texts(case: str) -> None:
    text, expected = WRONG_TEXTS[case]
    refuse(text, 8, expected)


def test_tensors_that_overlap_leave_holes_or_miss_the_end() -> None:
    def pair(first: list[int], second: list[int]) -> bytes:
        return json.dumps({"a": entry(data_offsets=first), "b": entry(data_offsets=second)}).encode()

    assert set(parse(pair([0, 8], [8, 16]), 16).specs) == {"a", "b"}
    assert list(parse(pair([8, 16], [0, 8]), 16).specs) == ["b", "a"]
    refuse(pair([0, 8], [4, 12]), 16, "'b' starts at 4, expected 8: it overlaps")
    refuse(pair([0, 8], [0, 8]), 16, "overlaps")
    refuse(pair([0, 8], [12, 20]), 20, "'b' starts at 12, expected 8: it leaves a hole")
    refuse(pair([0, 8], [8, 16]), 15, "truncated")
    refuse(pair([0, 8], [8, 16]), 17, "extended")
    empty_inside = {"a": entry(), "b": entry(shape=[0], data_offsets=[4, 4])}
    refuse(json.dumps(empty_inside).encode(), 8, "'b' starts at 4, expected 8")


CONTROL_CHARACTERS = [chr(code) for code in (*range(0x20), 0x7F, 0x85, 0x9B)]
HOSTILE_NAMES = [
    "",
    "..",
    "../x",
    "..\\x",
    "a/../b",
    "a..b",
    "/etc/passwd",
    "a/b",
    "C:\\x",
    "a\\b",
    "\u2028",
    "\u2029",
    "a\u202eb",
    "\u200b",
    "\ufeff",
    "\ue000",
    "\U000e0001",
    "\U0010ffff",
    "\xa0",
    "\xad",
    "a\x1b[31mred\x1b[0m",
    "a\x1b]0;title\x07",
    "a\r\nb",
    "a" * 513,
    "\U0001f600\x00",
    *(f"model{character}weight" for character in CONTROL_CHARACTERS),
]


def test_there_are_at_least_sixty_hostile_names() -> None:
    assert len(set(HOSTILE_NAMES)) >= 60


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_hostile_names(name: str, ensure_ascii: bool) -> None:
    refuse(json.dumps({name: entry()}, ensure_ascii=ensure_ascii).encode(), 8, "")


def test_lone_surrogates_in_names() -> None:
    for escape in ("\\ud800", "\\uDBFF", "\\udc00", "\\uDFFF", "\\udc00\\ud800", "a\\uD83D"):
        refuse(f'{{"{escape}":{EMPTY}}}'.encode(), 0, "surrogates not allowed")


def test_control_odd_but_honest_names_are_accepted() -> None:
    for name in ("a", "[red]", "\U0001f600", "层.0", "a b", "a" * 512, "'", '"', "{}", "model.layers.0"):
        text = json.dumps({name: entry()}).encode()
        assert list(parse(text, 8).specs) == [name]
        assert deserialize(struct.pack("<Q", len(text)) + text + bytes(8))[0][0] == name
    assert list(parse(f'{{"\\ud83d\\ude00":{EMPTY}}}'.encode()).specs) == ["\U0001f600"]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, "claims 0 bytes"),
        (1, "claims 1 bytes"),
        (len(LEGAL) - 1, "not valid JSON"),
        (len(LEGAL) + 1, "not valid JSON"),
        (len(LEGAL) + 8, "not valid JSON"),
        (len(LEGAL) + 9, "header claims"),
        (MAX_HEADER_BYTES + 1, "header claims"),
        (2**32, "header claims"),
        (2**63, "header claims"),
        (2**64 - 1, "header claims"),
    ],
)
def test_header_lengths_that_lie(tmp_path: Path, length: int, expected: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + LEGAL + bytes(8))
    with pytest.raises(HeaderError, match=r"a\.safetensors: ") as caught:
        read_shard_header(tmp_path, "a.safetensors")
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_every_truncation_of_a_small_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = struct.pack("<Q", len(LEGAL)) + LEGAL + bytes(8)
    for nbytes in range(len(whole)):
        path.write_bytes(whole[:nbytes])
        with pytest.raises(HeaderError):
            read_shard_header(tmp_path, path.name)
    path.write_bytes(whole + b"\0")
    with pytest.raises(HeaderError):
        read_shard_header(tmp_path, path.name)
    path.write_bytes(whole)
    assert read_shard_header(tmp_path, path.name).nbytes == len(whole)


def test_what_is_loaded_can_be_written_back() -> None:
    deep: Any = 1
    for _ in range(63):
        deep = [deep]
    for document in ({"a": [1, 2.5, 1e-06, None, True, "é\U0001f600"]}, deep, -1, "\\ud800"):
        assert load_json(json.dumps(document).encode(), "file") == document
    for text in (b"[1e999]", b"[-1e999]", b"[-0]", b'["\\ud800"]', b'{"\\udfff":1}', b"[" * 65 + b"]" * 65):
        with pytest.raises(HeaderError, match="file: not valid JSON"):
            load_json(text, "file")


def test_a_dtype_that_torch_lacks_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="F6_E2M3"):
        torch_dtype("F6_E2M3")
