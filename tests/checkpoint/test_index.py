"""The index: shard names, and a weight map that is either right or refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tools.checkpoint.index import encode_index, is_shard_name, parse_index, shard_name
from dsv3_tools.errors import CheckpointError


def test_names_are_those_of_the_release() -> None:
    assert shard_name(1, 163) == "model-00001-of-000163.safetensors"
    assert shard_name(163, 163) == "model-00163-of-000163.safetensors"
    assert all(is_shard_name(shard_name(n, 10**6)) for n in (1, 99_999, 100_000))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "a.safetensors", "_x.safetensors", "a-b_c.d.safetensors"]
)
def test_control_plain_names(name: str) -> None:
    assert is_shard_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".safetensors", "..safetensors", "a..safetensors", "../a.safetensors", "a/b.safetensors"),
        *("/a.safetensors", "\\a.safetensors", "-a.safetensors", ".a.safetensors", "a.safetensors/"),
        *("a.safetensors\n", "\na.safetensors", "a\0.safetensors", "a b.safetensors", "é.safetensors"),
        *("a.safetensors.bin", "a.SAFETENSORS", "model.bin", "~.safetensors", "$HOME.safetensors"),
        *("a:b.safetensors", "a*.safetensors", "\u0661.safetensors"),
    ],
)
def test_names_that_no_shard_may_have(name: str) -> None:
    assert not is_shard_name(name)
    with pytest.raises(CheckpointError, match="index: tensor 't' is said to be in"):
        parse_index(json.dumps({"weight_map": {"t": name}}).encode(), "index")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"7", b"null", b"{}", b'{"weight_map":{}}', b'{"weight_map":[]}']
)
def test_what_is_no_index(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^index: ") as caught:
        parse_index(text, "index")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["", "../t", "a/b", "a\nb", "a\x1b[31m", "\u202e", "a" * 513])
def test_hostile_tensor_names(name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be the name of a tensor") as caught:
        parse_index(json.dumps({"weight_map": {name: "a.safetensors"}}).encode(), "index")
    assert str(caught.value).isprintable()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(
        st.from_regex(r"model\.[a-z]{1,6}(\.[0-9]{1,3})?\.weight", fullmatch=True),
        st.integers(1, 163).map(lambda n: shard_name(n, 163)),
        min_size=1,
    )
)
def test_round_trip(weight_map: dict[str, str]) -> None:
    text = encode_index(weight_map, total_size=12, total_parameters=6)

    assert parse_index(text, "index") == weight_map
    document = json.loads(text)
    assert list(document["weight_map"]) == sorted(weight_map)
    assert document["metadata"] == {"total_parameters": 6, "total_size": 12}


def test_golden_bytes() -> None:
    text = encode_index(
        {"b.weight": "x.safetensors", "a.weight": "y.safetensors"}, total_size=4, total_parameters=2
    )
    assert text == (
        b'{\n  "metadata": {\n    "total_parameters": 2,\n    "total_size": 4\n  },\n'
        b'  "weight_map": {\n    "a.weight": "y.safetensors",\n    "b.weight": "x.safetensors"\n  }\n}\n'
    )


def test_a_stale_total_size_is_not_believed_but_no_obstacle() -> None:
    text = b'{"metadata":{"total_size":1369062772000},"weight_map":{"a":"a.safetensors"}}'
    assert parse_index(text, "index") == {"a": "a.safetensors"}
    assert parse_index(b'{"weight_map":{"a":"a.safetensors"}}', "index") == {"a": "a.safetensors"}
