"""Ways in which a checkpoint directory can be wrong, each of which every command must refuse.

`make_checkpoint` writes a small, right FP8 checkpoint; `CORRUPTIONS` maps a name to a function that
damages such a directory in place; `CULPRITS` maps the same name to what the error must mention.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.kernels.reference import quantize_fp8_block

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SHARDS = [f"model-{number:05d}-of-000003.safetensors" for number in (1, 2, 3)]

SMALL = PRESETS["deepseek-v3"] | {
    "first_k_dense_replace": 1,
    "hidden_size": 192,
    "intermediate_size": 160,
    "kv_lora_rank": 48,
    "moe_intermediate_size": 136,
    "n_group": 1,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "topk_group": 1,
    "v_head_dim": 24,
    "vocab_size": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
"""A model with every kind of tensor, most of them with partial blocks."""


def make_tensors() -> dict[str, torch.Tensor]:
    """Returns the tensors of the small FP8 checkpoint, in the model's order."""
    generator = torch.Generator().manual_seed(20250105)
    tensors = {}
    for name, spec in dense_tensors(ModelConfig.from_dict(SMALL)).items():
        weight = torch.randn(spec.shape, generator=generator) * 0.02
        parsed = parse_name(name)
        if parsed is not None and parsed.is_fp8_linear:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8_block(weight.bfloat16())
        else:
            tensors[name] = weight if spec.dtype == "F32" else weight.bfloat16()
    return tensors


def make_checkpoint(path: Path) -> None:
    """Writes a right checkpoint of three shards into the new directory `path`, with files beside it."""
    path.mkdir(parents=True)
    tensors = make_tensors()
    names = list(tensors)
    third = -(-len(names) // 3)
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        inside = names[number * third : (number + 1) * third]
        save_file({name: tensors[name] for name in inside}, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(inside, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": dict(sorted(weight_map.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (path / CONFIG).write_text(json.dumps(SMALL, indent=2) + "\n")
    (path / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (path / "generation_config.json").write_text('{"do_sample": true}\n')
    (path / "modeling_small.py").write_text("raise RuntimeError('a model directory was imported')\n")


def read_header(shard: Path) -> tuple[dict[str, Any], bytes]:
    """Returns a shard's header as JSON and the bytes of its tensors."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(shard: Path, text: bytes, payload: bytes, *, length: int | None = None) -> None:
    """Writes a shard of this header text, with a header length that may be a lie."""
    start = (len(text) if length is None else length).to_bytes(8, "little")
    shard.write_bytes(start + text + payload)


def _header(edit: Callable[[dict[str, Any]], Any], path: Path) -> None:
    """Rewrites the second shard's header; the shard's tensors stay as they are."""
    entries, payload = read_header(path / SHARDS[1])
    edited = edit(entries)
    text = json.dumps(entries if edited is None else edited).encode()
    write_raw(path / SHARDS[1], text, payload)


def _header_text(edit: Callable[[bytes], bytes], path: Path) -> None:
    entries, payload = read_header(path / SHARDS[1])
    write_raw(path / SHARDS[1], edit(json.dumps(entries).encode()), payload)


def _entry(edit: Callable[[dict[str, Any]], Any], path: Path) -> None:
    """Edits the entry of the tensor whose bytes come last in the second shard."""

    def last(entries: dict[str, Any]) -> None:
        name = max(entries, key=lambda n: entries[n]["data_offsets"][1] if n != "__metadata__" else -1)
        edit(entries[name])

    _header(last, path)


def _bytes(edit: Callable[[bytes], bytes], path: Path, *, name: str = SHARDS[1]) -> None:
    (path / name).write_bytes(edit((path / name).read_bytes()))


def _json(name: str, edit: Callable[[dict[str, Any]], Any], path: Path) -> None:
    document = json.loads((path / name).read_text())
    edited = edit(document)
    (path / name).write_text(json.dumps(document if edited is None else edited))


def _text(name: str, data: bytes, path: Path) -> None:
    (path / name).write_bytes(data)


def _replace(name: str, make: Callable[[Path], Any], path: Path) -> None:
    """Puts something that is not a regular file in a file's place."""
    (path / name).unlink()
    make(path / name)


def _link_out(name: str, path: Path) -> None:
    outside = path.with_name(path.name + "-outside")
    outside.mkdir()
    shutil.move(path / name, outside / name)
    (path / name).symlink_to(outside / name)


def _sparse(name: str, nbytes: int, path: Path) -> None:
    with (path / name).open("wb") as file:
        file.truncate(nbytes)


def _map(edit: Callable[[dict[str, Any]], Any], path: Path) -> None:
    document = json.loads((path / INDEX).read_text())
    edit(document["weight_map"])
    (path / INDEX).write_text(json.dumps(document))


def _shard_of_first(value: Any, path: Path) -> None:
    _map(lambda weight_map: weight_map.update({min(weight_map): value}), path)


def _swap_shards(path: Path) -> None:
    first, second = (path / name for name in SHARDS[:2])
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def _copy_tensor_to_first_shard(path: Path) -> None:
    entries, payload = read_header(path / SHARDS[0])
    twice, more = read_header(path / SHARDS[1])
    name = min(twice.keys() - {"__metadata__"})
    begin, end = twice[name]["data_offsets"]
    entries[name] = twice[name] | {"data_offsets": [len(payload), len(payload) + end - begin]}
    write_raw(path / SHARDS[0], json.dumps(entries).encode(), payload + more[begin:end])


def _rename_first(new: str, entries: dict[str, Any]) -> None:
    entries[new] = entries.pop(min(entries.keys() - {"__metadata__"}))


def _set(document: dict[str, Any], *keys: Any, to: Any) -> None:
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = to


def _drop(key: str, document: dict[str, Any]) -> None:
    del document[key]


def _insert_into_header(text: bytes, path: Path) -> None:
    _header_text(lambda header: header[:-1] + b"," + text + b"}", path)


_EMPTY_ENTRY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
_NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
_DEEP = b'{"a":' * 300 + b"1" + b"}" * 300
_ESCAPE = "model.norm.\x1b[31mred"

_TABLE: list[tuple[str, str, Callable[[Path], Any]]] = [
    # Shards.
    ("shard_missing", SHARDS[1], lambda path: (path / SHARDS[1]).unlink()),
    ("shard_empty", SHARDS[1], partial(_bytes, lambda _: b"")),
    ("shard_seven_bytes", SHARDS[1], partial(_bytes, lambda data: data[:7])),
    ("shard_only_a_length", SHARDS[1], partial(_bytes, lambda data: data[:8])),
    ("shard_cut_in_header", SHARDS[1], partial(_bytes, lambda data: data[:100])),
    ("shard_one_byte_short", SHARDS[1], partial(_bytes, lambda data: data[:-1])),
    ("shard_half", SHARDS[1], partial(_bytes, lambda data: data[: len(data) // 2])),
    ("shard_one_byte_long", SHARDS[1], partial(_bytes, lambda data: data + b"\0")),
    ("shard_garbage", SHARDS[1], partial(_bytes, lambda _: bytes(range(255, -1, -1)) * 8)),
    ("shard_zeros", SHARDS[1], partial(_bytes, lambda data: bytes(len(data)))),
    ("shard_is_html", SHARDS[1], partial(_bytes, lambda _: b"<!DOCTYPE html><html>404</html>")),
    ("shard_is_lfs_pointer", SHARDS[1], partial(_bytes, lambda _: b"version https://git-lfs.github.com\n")),
    ("shards_swapped", SHARDS[0], _swap_shards),
    (
        "shard_stray",
        "model-00004",
        lambda path: shutil.copy(path / SHARDS[0], path / "model-00004.safetensors"),
    ),
    (
        "shard_stray_control_character",
        r"model-\n\x1b",
        lambda path: shutil.copy(path / SHARDS[0], path / "model-\n\x1b[31m.safetensors"),
    ),
    (
        "single_file_stray",
        "model.safetensors",
        lambda path: shutil.copy(path / SHARDS[0], path / "model.safetensors"),
    ),
    # A shard's header.
    ("header_length_zero", SHARDS[1], partial(_bytes, lambda data: bytes(8) + data[8:])),
    ("header_length_2_63", SHARDS[1], partial(_bytes, lambda data: b"\0" * 7 + b"\x80" + data[8:])),
    ("header_length_one_less", SHARDS[1], partial(_bytes, lambda data: bytes([data[0] ^ 1]) + data[1:])),
    ("header_over_25_mb", SHARDS[1], partial(_header_text, lambda text: text + b" " * 25_000_000)),
    ("header_leading_space", SHARDS[1], partial(_header_text, lambda text: b" " + text)),
    ("header_not_json", SHARDS[1], partial(_header_text, lambda text: text[:-1] + b",}")),
    ("header_list", SHARDS[1], partial(_header, lambda entries: [entries])),
    (
        "header_not_utf8",
        SHARDS[1],
        partial(_header_text, lambda text: text.replace(b"model", b"mod\xffl", 1)),
    ),
    ("header_nesting_bomb", SHARDS[1], partial(_header_text, lambda _: _NESTED)),
    (
        "header_name_twice",
        "stands twice",
        partial(_insert_into_header, b'"a":' + _EMPTY_ENTRY + b',"a":' + _EMPTY_ENTRY),
    ),
    ("header_metadata_not_text", "__metadata__", partial(_header, lambda e: e.update(__metadata__={"a": 1}))),
    (
        "header_metadata_surrogate",
        SHARDS[1],
        partial(_header, lambda e: e.update(__metadata__={"a": "\ud800"})),
    ),
    (
        "tensor_hole",
        "hole",
        partial(_entry, lambda e: _set(e, "data_offsets", to=[n + 4 for n in e["data_offsets"]])),
    ),
    (
        "tensor_overlap",
        "overlaps",
        partial(_entry, lambda e: _set(e, "data_offsets", to=[n - 1 for n in e["data_offsets"]])),
    ),
    ("tensor_unknown_field", SHARDS[1], partial(_entry, lambda e: e.update(strides=[1]))),
    ("tensor_missing_field", SHARDS[1], partial(_entry, partial(_drop, "shape"))),
    ("tensor_unknown_dtype", "F7", partial(_entry, lambda e: e.update(dtype="F7"))),
    ("tensor_wrong_dtype", SHARDS[1], partial(_entry, lambda e: e.update(dtype="I64"))),
    ("tensor_wrong_shape", SHARDS[1], partial(_entry, lambda e: e["shape"].append(2))),
    (
        "tensor_float_shape",
        SHARDS[1],
        partial(_entry, lambda e: e.update(shape=[float(n) for n in e["shape"]])),
    ),
    ("tensor_bool_shape", SHARDS[1], partial(_entry, lambda e: e["shape"].append(True))),
    ("tensor_negative_shape", SHARDS[1], partial(_entry, lambda e: e.update(shape=[-n for n in e["shape"]]))),
    ("tensor_huge_shape", SHARDS[1], partial(_entry, lambda e: e.update(shape=[2**62, 2**62]))),
    ("tensor_offsets_reversed", SHARDS[1], partial(_entry, lambda e: e["data_offsets"].reverse())),
    ("tensor_name_empty", SHARDS[1], partial(_header, partial(_rename_first, ""))),
    ("tensor_name_escape_code", r"\x1b[31mred", partial(_header, partial(_rename_first, _ESCAPE))),
    ("tensor_name_path", "../../etc", partial(_header, partial(_rename_first, "../../etc/passwd"))),
    ("tensor_name_surrogate", SHARDS[1], partial(_header, partial(_rename_first, "model.\udcff"))),
    ("tensor_not_in_index", "model.spare", partial(_insert_into_header, b'"model.spare":' + _EMPTY_ENTRY)),
    ("tensor_renamed", "model.renamed", partial(_header, partial(_rename_first, "model.renamed"))),
    ("tensor_in_two_shards", SHARDS[0], _copy_tensor_to_first_shard),
    # The index.
    ("index_missing", INDEX, lambda path: (path / INDEX).unlink()),
    ("index_empty", INDEX, partial(_text, INDEX, b"")),
    ("index_garbage", INDEX, partial(_text, INDEX, bytes(range(256)))),
    ("index_cut", INDEX, partial(_bytes, lambda data: data[:-20], name=INDEX)),
    ("index_list", INDEX, partial(_text, INDEX, b"[]")),
    ("index_no_weight_map", INDEX, partial(_json, INDEX, partial(_drop, "weight_map"))),
    ("index_empty_map", INDEX, partial(_map, lambda weight_map: weight_map.clear())),
    (
        "index_map_is_list",
        INDEX,
        partial(_json, INDEX, lambda index: {"weight_map": list(index["weight_map"])}),
    ),
    ("index_nan", INDEX, partial(_text, INDEX, b'{"metadata":NaN,"weight_map":{"a":"a.safetensors"}}')),
    (
        "index_key_twice",
        INDEX,
        partial(_text, INDEX, b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}'),
    ),
    ("index_nesting_bomb", INDEX, partial(_text, INDEX, _NESTED)),
    ("index_too_large", INDEX, partial(_sparse, INDEX, 100_000_001)),
    ("index_is_directory", INDEX, partial(_replace, INDEX, Path.mkdir)),
    ("index_is_fifo", INDEX, partial(_replace, INDEX, os.mkfifo)),
    ("index_dangling_link", INDEX, partial(_replace, INDEX, lambda path: path.symlink_to("nowhere.json"))),
    ("index_link_loop", INDEX, partial(_replace, INDEX, lambda path: path.symlink_to(INDEX))),
    ("index_link_out", INDEX, partial(_link_out, INDEX)),
    (
        "index_tensor_not_in_shard",
        "model.spare",
        partial(_map, lambda m: m.update({"model.spare": SHARDS[0]})),
    ),
    ("index_tensor_missing", "not in the index", partial(_map, lambda m: m.pop("model.embed_tokens.weight"))),
    (
        "index_tensor_in_wrong_shard",
        "embed_tokens",
        partial(_map, lambda m: m.update({"model.embed_tokens.weight": SHARDS[2]})),
    ),
    ("index_hostile_name", r"\x1b[31mred", partial(_map, lambda m: m.update({_ESCAPE: SHARDS[0]}))),
    (
        "index_shard_left_out",
        SHARDS[2],
        partial(_map, lambda m: [m.pop(n) for n, s in list(m.items()) if s == SHARDS[2]]),
    ),
    ("map_parent_folder", "../x.safetensors", partial(_shard_of_first, "../x.safetensors")),
    ("map_absolute", "/etc/x.safetensors", partial(_shard_of_first, "/etc/x.safetensors")),
    ("map_subfolder", "sub/x.safetensors", partial(_shard_of_first, "sub/x.safetensors")),
    ("map_number", INDEX, partial(_shard_of_first, 7)),
    ("map_null", INDEX, partial(_shard_of_first, None)),
    ("map_empty", INDEX, partial(_shard_of_first, "")),
    ("map_not_safetensors", "pytorch_model.bin", partial(_shard_of_first, "pytorch_model.bin")),
    ("map_hidden_file", ".x.safetensors", partial(_shard_of_first, ".x.safetensors")),
    ("map_nul", r"a\x00.safetensors", partial(_shard_of_first, "a\0.safetensors")),
    ("map_name_too_long", "aaaa", partial(_shard_of_first, "a" * 300 + ".safetensors")),
    ("map_missing_shard", "y.safetensors", partial(_shard_of_first, "y.safetensors")),
    # What lies under a shard's name.
    ("shard_is_directory", SHARDS[1], partial(_replace, SHARDS[1], Path.mkdir)),
    ("shard_is_fifo", SHARDS[1], partial(_replace, SHARDS[1], os.mkfifo)),
    ("shard_is_device", SHARDS[1], partial(_replace, SHARDS[1], lambda path: path.symlink_to("/dev/zero"))),
    ("shard_dangling_link", SHARDS[1], partial(_replace, SHARDS[1], lambda path: path.symlink_to("nowhere"))),
    ("shard_link_loop", SHARDS[1], partial(_replace, SHARDS[1], lambda path: path.symlink_to(SHARDS[1]))),
    ("shard_link_out", SHARDS[1], partial(_link_out, SHARDS[1])),
    # config.json.
    ("config_missing", CONFIG, lambda path: (path / CONFIG).unlink()),
    ("config_empty", CONFIG, partial(_text, CONFIG, b"")),
    ("config_not_json", CONFIG, partial(_text, CONFIG, b"model_type: deepseek_v3\n")),
    ("config_not_utf8", CONFIG, partial(_text, CONFIG, b'{"model_type": "\xff"}')),
    ("config_list", CONFIG, partial(_text, CONFIG, b"[]")),
    ("config_text", CONFIG, partial(_text, CONFIG, b'"deepseek_v3"')),
    ("config_nan", "NaN", partial(_json, CONFIG, lambda c: c.update(rope_theta=float("nan")))),
    (
        "config_beyond_float64",
        CONFIG,
        partial(_bytes, lambda d: d.replace(b"10000,", b"1e999,"), name=CONFIG),
    ),
    ("config_surrogate", CONFIG, partial(_json, CONFIG, lambda c: c.update(note="\ud800"))),
    ("config_key_twice", CONFIG, partial(_bytes, lambda d: b'{"hidden_size": 1,' + d[1:], name=CONFIG)),
    ("config_nested_deep", CONFIG, partial(_text, CONFIG, _DEEP)),
    ("config_nesting_bomb", CONFIG, partial(_text, CONFIG, _NESTED)),
    ("config_too_large", CONFIG, partial(_sparse, CONFIG, 10_000_001)),
    ("config_is_directory", CONFIG, partial(_replace, CONFIG, Path.mkdir)),
    ("config_is_fifo", CONFIG, partial(_replace, CONFIG, os.mkfifo)),
    ("config_dangling_link", CONFIG, partial(_replace, CONFIG, lambda path: path.symlink_to("nowhere"))),
    ("config_link_loop", CONFIG, partial(_replace, CONFIG, lambda path: path.symlink_to(CONFIG))),
    ("config_link_out", CONFIG, partial(_link_out, CONFIG)),
    ("config_no_model_type", "model_type", partial(_json, CONFIG, partial(_drop, "model_type"))),
    ("config_other_model", "llama", partial(_json, CONFIG, lambda c: c.update(model_type="llama"))),
    (
        "config_deepseek_v4",
        "deepseek_v4",
        partial(_json, CONFIG, lambda c: c.update(model_type="deepseek_v4")),
    ),
    ("config_model_type_number", "model_type", partial(_json, CONFIG, lambda c: c.update(model_type=3))),
    ("config_no_hidden_size", "hidden_size", partial(_json, CONFIG, partial(_drop, "hidden_size"))),
    ("config_text_size", "hidden_size", partial(_json, CONFIG, lambda c: c.update(hidden_size="192"))),
    ("config_float_size", "hidden_size", partial(_json, CONFIG, lambda c: c.update(hidden_size=192.0))),
    (
        "config_bool_layers",
        "num_hidden_layers",
        partial(_json, CONFIG, lambda c: c.update(num_hidden_layers=True)),
    ),
    (
        "config_zero_layers",
        "num_hidden_layers",
        partial(_json, CONFIG, lambda c: c.update(num_hidden_layers=0)),
    ),
    (
        "config_negative_mtp",
        "num_nextn",
        partial(_json, CONFIG, lambda c: c.update(num_nextn_predict_layers=-1)),
    ),
    ("config_huge_size", "vocab_size", partial(_json, CONFIG, lambda c: c.update(vocab_size=2**40))),
    # The directory.
    ("unfinished_conversion", ".dsv3", lambda path: (path / ".dsv3").mkdir()),
    ("directory_missing", "does not exist", shutil.rmtree),
    ("directory_is_file", "is a file", lambda path: (shutil.rmtree(path), path.write_bytes(b""))),
]

CORRUPTIONS: dict[str, Callable[[Path], None]] = {name: function for name, _, function in _TABLE}
CULPRITS: dict[str, str] = {name: culprit for name, culprit, _ in _TABLE}
