"""Tokens from files, from text and from the built-in text; transformers says what a tokenizer's answer is."""
# ruff: noqa: RUF001 (DeepSeek-V3's special tokens and pattern)

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsv3_tools.errors import CheckpointError, UsageError
from dsv3_tools.model import tokens as tokens_module
from dsv3_tools.model.tokenizer import read_tokenizer
from dsv3_tools.model.tokens import DEFAULT_LENGTH, Tokens, cut, limit, read_tokens

ROOT = Path(__file__).resolve().parents[2]
BUILT_IN = (ROOT / "dsv3_tools" / "model" / "text.txt").read_text(encoding="utf-8")
VOCAB_SIZE = 2048
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def read(directory: Path, **changes: Any) -> Tokens:
    arguments = {"tokens": None, "text": None, "length": None, "max_tokens": None, "vocab_size": VOCAB_SIZE}
    return read_tokens(directory, **(arguments | changes))


@pytest.fixture
def checkpoint(tmp_path: Path, miniature: Path) -> Path:
    """The small files of the shipped model, to be changed."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(miniature / name, path)
    return path


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    document = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


@pytest.fixture
def deepseek(checkpoint: Path) -> Path:
    """A tokenizer laid out as DeepSeek-V3's: BOS is in `tokenizer_config.json` alone."""
    isolated = [
        pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+")
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([*isolated, byte_level])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator([BUILT_IN], trainer)
    library.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    library.save(str(checkpoint / "tokenizer.json"))
    bos = {"__type": "AddedToken", "content": BOS, "lstrip": False, "normalized": True, "rstrip": False}
    edit(checkpoint / "tokenizer_config.json", bos_token=bos, tokenizer_class="LlamaTokenizerFast")
    return checkpoint


TEXTS = {
    "prose": "The sea comes up the beach and goes back again.\r\n\n  Twice.",
    "code": "def f(x):\n\treturn {**x, 'π': 3.14159}\n",
    "chinese": "城里的老图书馆下个月就要搬家了。三十万册书",
    "emoji": "naïve café 🧀👩‍👩‍👧 ﬁn\u0301\ufeff",
    "special tokens": f"one {EOS}two{BOS} three",
    "built-in": BUILT_IN,
}


def sequences_of(ids: list[int], bos: list[int], length: int) -> list[list[int]]:
    taken = length - len(bos)
    starts = range(0, max(1, len(ids) - taken + 1), taken)
    return [bos + ids[start : start + taken] for start in starts]


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_those_of_transformers(miniature: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXTS[name].encode())
    oracle = AutoTokenizer.from_pretrained(miniature)
    whole = oracle(TEXTS[name], verbose=False).input_ids
    assert whole[0] == oracle.bos_token_id
    found = read(miniature, text=tmp_path / "a.txt", length=10_000)
    assert found.batch_BL.tolist() == [whole]
    assert found.batch_BL.dtype == torch.int64
    assert found.source == f"a.txt, 1 x {len(whole)}"
    cut_up = read(miniature, text=tmp_path / "a.txt", length=8)
    assert cut_up.batch_BL.tolist() == sequences_of(whole[1:], whole[:1], 8)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_of_a_tokenizer_like_deepseek_v3(deepseek: Path, tmp_path: Path, name: str) -> None:
    """transformers is told of BOS: its AutoTokenizer (5.23) ignores `add_bos_token` beside tokenizer.json."""
    (tmp_path / "a.txt").write_bytes(TEXTS[name].encode())
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(deepseek / "tokenizer.json"), bos_token=BOS, add_bos_token=True
    )
    found = read(deepseek, text=tmp_path / "a.txt", length=10_000)
    assert found.batch_BL.tolist() == [oracle(TEXTS[name], verbose=False).input_ids]
    assert found.batch_BL[0, 0] == 0
    assert found.tokenizer is not None
    assert found.tokenizer.decode(found.batch_BL[0].tolist()) == BOS + TEXTS[name]


@pytest.mark.parametrize(
    "changes",
    [{"add_bos_token": False}, {"add_bos_token": None}, {"add_bos_token": None, "bos_token": None}],
    ids=str,
)
def test_no_bos_where_nothing_asks_for_it(deepseek: Path, changes: dict[str, Any]) -> None:
    with_bos = read(deepseek, length=10_000)
    edit(deepseek / "tokenizer_config.json", **changes)
    without = read(deepseek, length=10_000)
    assert without.batch_BL.tolist() == with_bos.batch_BL[:, 1:].tolist()
    (deepseek / "tokenizer_config.json").unlink()
    assert torch.equal(read(deepseek, length=10_000).batch_BL, without.batch_BL)


def test_bos_of_the_post_processor_needs_no_config(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    assert read(checkpoint).batch_BL[:, 0].tolist() == [0] * 10


def test_bos_of_the_post_processor_comes_first(checkpoint: Path) -> None:
    edit(checkpoint / "tokenizer_config.json", add_bos_token=False)
    expected = AutoTokenizer.from_pretrained(checkpoint)(BUILT_IN).input_ids
    assert expected[0] == 0
    assert read(checkpoint, length=10_000).batch_BL.tolist() == [expected]


def test_truncation_and_padding_in_the_file_do_not_count(checkpoint: Path) -> None:
    expected = read(checkpoint).batch_BL
    library = LibraryTokenizer.from_file(str(checkpoint / "tokenizer.json"))
    library.enable_truncation(16)
    library.enable_padding(length=100_000)
    library.save(str(checkpoint / "tokenizer.json"))
    assert torch.equal(read(checkpoint).batch_BL, expected)


def test_built_in_text(miniature: Path) -> None:
    found = read(miniature)
    assert found.batch_BL.shape == (10, DEFAULT_LENGTH)
    assert found.source == "built-in text, 10 x 512"
    assert found.tokenizer is not None
    rows = [found.tokenizer.decode(row) for row in found.batch_BL[:, 1:].tolist()]
    assert BUILT_IN.startswith(rows[0])
    assert 10_000 < len(BUILT_IN.encode()) < 14_000


def test_decode_shows_what_is_not_text(miniature: Path) -> None:
    tokenizer = read_tokenizer(miniature)
    cheese = tokenizer.encode("🧀")
    assert len(cheese) == 4
    assert tokenizer.decode(cheese) == "🧀"
    assert tokenizer.decode(cheese[:3]) == "\ufffd"
    assert tokenizer.decode([0, 5000, 5001, *cheese, 1]) == f"{BOS}<5000><5001>🧀{EOS}"
    assert tokenizer.decode([]) == ""


INTEGERS = ("i1", "u1", "<i2", "<u2", "<i4", ">i4", "<u4", "<i8", ">i8", "<u8")


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(60,), (5, 12), (12, 5)], ids=str)
def test_npy(miniature: Path, tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = np.arange(60).reshape(shape)
    np.save(tmp_path / "tokens.npy", values.astype(dtype))
    found = read(miniature, tokens=tmp_path / "tokens.npy", length=7)
    expected = values[:56].reshape(8, 7) if values.ndim == 1 else values[:, :7]
    assert found.batch_BL.tolist() == expected.tolist()
    assert found.batch_BL.dtype == torch.int64
    assert found.source == "tokens.npy, {} x {}".format(*expected.shape)
    assert found.tokenizer is not None


def test_npy_in_column_order(miniature: Path, tmp_path: Path) -> None:
    values = np.asfortranarray(np.arange(12).reshape(3, 4))
    np.save(tmp_path / "tokens.npy", values)
    found = read(miniature, tokens=tmp_path / "tokens.npy")
    assert found.batch_BL.tolist() == values.tolist()
    assert found.batch_BL.is_contiguous()


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if ">" not in d])
def test_safetensors(miniature: Path, tmp_path: Path, dtype: str) -> None:
    values = np.arange(60).reshape(4, 15).astype(dtype)
    save_file({"anything": values}, tmp_path / "a.safetensors")
    assert read(miniature, tokens=tmp_path / "a.safetensors").batch_BL.tolist() == values.tolist()


@pytest.mark.parametrize("name", ["tokens", "input_ids"])
def test_safetensors_by_name_among_others(miniature: Path, tmp_path: Path, name: str) -> None:
    others = {"attention_mask": np.ones((2, 3), np.int64), "losses": np.ones((2, 3), np.float32)}
    save_file(others | {name: np.array([[1, 2, 3]])}, tmp_path / "a.safetensors")
    assert read(miniature, tokens=tmp_path / "a.safetensors").batch_BL.tolist() == [[1, 2, 3]]


def test_a_float_tensor_beside_the_tokens_is_no_matter(miniature: Path, tmp_path: Path) -> None:
    tensors = {"a": np.array([4, 5], np.uint16), "tokens": np.ones(3, np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert read(miniature, tokens=tmp_path / "a.safetensors").batch_BL.tolist() == [[4, 5]]


def test_heldout_tokens_that_ship(miniature: Path, tmp_path: Path) -> None:
    path = ROOT / "miniature" / "heldout_tokens.safetensors"
    (tmp_path / "link.safetensors").symlink_to(path)
    found = read(miniature, tokens=tmp_path / "link.safetensors", max_tokens=1000)
    assert found.source == "link.safetensors, 3 x 257"


def test_a_stream_shorter_than_a_sequence_is_one(miniature: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    assert read(miniature, tokens=tmp_path / "a.npy").batch_BL.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("positions", "length", "expected"),
    [(300, None, 300), (300, 300, 300), (300, 7, 7), (1000, None, 512), (None, None, 512), (None, 900, 900)],
)
def test_length_by_default_and_at_most(checkpoint: Path, positions, length, expected) -> None:
    edit(checkpoint / "config.json", max_position_embeddings=positions)
    assert read(checkpoint, length=length).batch_BL.shape[1] == expected


@pytest.mark.parametrize(
    ("max_tokens", "shape"),
    [(None, (10, 512)), (10**9, (10, 512)), (1535, (2, 512)), (1536, (3, 512)), (511, (1, 511)), (2, (1, 2))],
)
def test_max_tokens(miniature: Path, max_tokens: int | None, shape: tuple[int, int]) -> None:
    found = read(miniature, max_tokens=max_tokens).batch_BL
    assert tuple(found.shape) == shape
    assert torch.equal(found, read(miniature).batch_BL[: shape[0], : shape[1]])


@given(num_tokens=st.integers(0, 60), length=st.integers(2, 20), bos_id=st.none() | st.just(99))
def test_cutting_loses_only_the_end(num_tokens: int, length: int, bos_id: int | None) -> None:
    stream = np.arange(num_tokens)
    rows = cut(stream, length, bos_id=bos_id)
    text = rows
    if bos_id is not None:
        assert (rows[:, 0] == bos_id).all()
        text = rows[:, 1:]
    assert text.ravel().tolist() == stream[: text.size].tolist()
    lost = num_tokens - text.size
    assert lost < length
    assert rows.shape[1] == length or (len(rows) == 1 and rows.shape[1] < length and lost == 0)


@given(shape=st.tuples(st.integers(1, 9), st.integers(2, 9)), max_tokens=st.none() | st.integers(2, 100))
def test_limiting_takes_as_much_as_it_may(shape: tuple[int, int], max_tokens: int | None) -> None:
    rows = np.arange(shape[0] * shape[1]).reshape(shape)
    found = limit(rows, max_tokens)
    most = rows.size if max_tokens is None else max_tokens
    assert found.tolist() == rows[: len(found), : found.shape[1]].tolist()
    assert found.size <= most
    if len(found) > 1 or found.size < most:
        assert found.shape[1] == shape[1]
        assert len(found) == shape[0] or found.size + shape[1] > most


@pytest.mark.parametrize("shape", [(60,), (5, 12)], ids=str)
@pytest.mark.parametrize(("dtype", "value"), [("i4", -1), ("i8", 100), ("u8", 2**64 - 1), ("u1", 100)])
def test_ids_that_the_model_does_not_have(miniature: Path, tmp_path: Path, shape, dtype, value) -> None:
    values = np.full(60, 99).astype(dtype)
    np.save(tmp_path / "a.npy", values.reshape(shape))
    assert read(miniature, tokens=tmp_path / "a.npy", length=12, vocab_size=100).batch_BL.shape == (5, 12)
    values[[31, 40]] = value
    np.save(tmp_path / "a.npy", values.reshape(shape))
    with pytest.raises(
        CheckpointError,
        match=rf"a\.npy: sequence 2, position 7 \(from 0\): token {value}, expected 0 to vocab_size - 1, 99;",
    ):
        read(miniature, tokens=tmp_path / "a.npy", length=12, vocab_size=100)
    used = read(miniature, tokens=tmp_path / "a.npy", length=12, max_tokens=24, vocab_size=100)
    assert used.batch_BL.shape == (2, 12)  # what is not used is not looked at


def test_a_tokenizer_of_another_model(miniature: Path) -> None:
    most = int(read(miniature).batch_BL.max())
    assert read(miniature, vocab_size=most + 1).batch_BL.max() == most
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: .* token {most}, expected 0 to .* own tok"):
        read(miniature, vocab_size=most)


def npy(values: Any) -> Callable[[Path], object]:
    return lambda path: np.save(path, values, allow_pickle=True)


def safetensors(**tensors: Any) -> Callable[[Path], object]:
    return lambda path: save_file(tensors, path)


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def absent(path: Path) -> None:
    """Writes nothing."""


def shortened(path: Path) -> None:
    np.save(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-1])


ONES = np.ones((2, 3), np.int64)
BAD_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "cannot be opened: No such file": ("a.npy", absent),
    "cannot be opened: No such": ("a.safetensors", absent),
    "cannot be opened: Is a directory": ("a.npy", Path.mkdir),
    ".*is not a regular file": ("a.safetensors", Path.mkdir),
    "not an array of numbers: EOF": ("a.npy", content(b"")),
    "not an array of numbers: the magic string": ("a.npy", content(b"hello world")),
    "not an array of numbers: .*Python objects": ("a.npy", npy(np.array([1, None]))),
    "not an array of numbers: .*EOF in multi-line": (
        "a.npy",
        content(b"\x93NUMPY\x01\x00\x10\x00{'descr': (     \n"),
    ),
    "not an array of numbers: mmap length": ("a.npy", shortened),
    r"got float32 \[3\], expected integers": ("a.npy", npy(np.ones(3, np.float32))),
    r"got bool \[3\], expected integers": ("a.npy", npy(np.ones(3, bool))),
    r"got int64 \[\], expected integers": ("a.npy", npy(np.int64(3))),
    r"got int64 \[1, 2, 3\], expected integers": ("a.npy", npy(np.ones((1, 2, 3), np.int64))),
    "got 0 x 3 tokens, expected": ("a.npy", npy(np.ones((0, 3), np.int64))),
    "got 1 x 0 tokens, expected": ("a.npy", npy(np.ones(0, np.int64))),
    "got 1 x 1 tokens, expected": ("a.npy", npy(np.ones(1, np.int64))),
    "got 2 x 0 tokens, expected": ("a.safetensors", safetensors(a=ONES[:, :0])),
    "not a safetensors file": ("a.safetensors", content(b"hello world")),
    r"got a I64 \[2, 3\], b I64 \[2, 3\], expected one": ("a.safetensors", safetensors(a=ONES, b=ONES)),
    r"got tokens F64 \[2\], expected one integer": ("a.safetensors", safetensors(tokens=np.ones(2))),
    r"got a I64 \[1, 2, 3\], expected one": ("a.safetensors", safetensors(a=ONES[None])),
    "got no tensor, expected one": ("a.safetensors", safetensors()),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_token_files_that_are_refused(miniature: Path, tmp_path: Path, message: str) -> None:
    name, make = BAD_FILES[message]
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}") as caught:
        read(miniature, tokens=tmp_path / name)
    assert "\n" not in str(caught.value)


BAD_TEXTS: dict[str, bytes] = {
    "there is no text in it": b"",
    r"byte 4 is 0xff, expected UTF-8": b"abcd\xffefg",
    r"byte 3 is 0xe5, expected UTF-8": b"abc" + "城".encode()[:2],
    "too much text, expected at most 100 bytes": b"a" * 101,
}


@pytest.mark.parametrize("message", BAD_TEXTS)
def test_texts_that_are_refused(miniature, tmp_path, monkeypatch, message: str) -> None:
    monkeypatch.setattr(tokens_module, "_MAX_TEXT_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 100)
    read(miniature, text=path)
    path.write_bytes(BAD_TEXTS[message])
    with pytest.raises(CheckpointError, match=rf"a\.txt: {message}"):
        read(miniature, text=path)


def test_a_text_that_is_not_there(miniature: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.txt: cannot be read: No such file"):
        read(miniature, text=tmp_path / "a.txt")


OPTIONS = {
    r"--tokens a\.npy and --text b\.txt: got both": {"tokens": Path("a.npy"), "text": Path("b.txt")},
    "--length: got 1, expected at least 2": {"length": 1},
    "--max-tokens: got 1, expected at least 2": {"max_tokens": 1},
    "--length 10,241: expected at most max_position_embeddings, 10,240": {"length": 10_241},
    r"a\.bin: got a \.bin file, expected \.npy or": {"tokens": Path("a.bin")},
    "a: got a nameless file, expected": {"tokens": Path("a")},
}


@pytest.mark.parametrize("message", OPTIONS)
def test_options_that_make_no_sense(miniature: Path, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        read(miniature, **OPTIONS[message])


def test_rows_longer_than_the_model_goes(checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 11), np.int64))
    edit(checkpoint / "config.json", max_position_embeddings=10)
    with pytest.raises(
        UsageError, match=r"a\.npy: rows of 11: expected at most .*, 10; give a smaller --len"
    ):
        read(checkpoint, tokens=tmp_path / "a.npy")
    assert read(checkpoint, tokens=tmp_path / "a.npy", length=10).batch_BL.shape == (2, 10)


@pytest.mark.parametrize("value", [0, 1, True, "512", 512.0])
def test_positions_that_are_no_number(checkpoint: Path, value: object) -> None:
    edit(checkpoint / "config.json", max_position_embeddings=value)
    with pytest.raises(CheckpointError, match=f"max_position_embeddings is '{value}', expected a whole"):
        read(checkpoint)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.arange(20))
    return tmp_path / "ids.npy"


def test_without_the_library_there_are_only_ids(miniature, ids, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'dsv3-tools\[text\]', or give token ids"):
        read(miniature)
    found = read(miniature, tokens=ids)
    assert found.tokenizer is None
    assert found.batch_BL.tolist() == [list(range(20))]


@pytest.mark.parametrize("other", [None, "tiktoken.model", "tokenizer.model"])
def test_without_a_tokenizer_there_are_only_ids(checkpoint: Path, ids: Path, other: str | None) -> None:
    (checkpoint / "tokenizer.json").unlink()
    message = "there is no tokenizer.json"
    if other:
        (checkpoint / other).write_bytes(b"")
        message = f"got {other}, expected tokenizer.json"
    with pytest.raises(CheckpointError, match=f"^{checkpoint}: {message}.*; give token ids"):
        read(checkpoint)
    assert read(checkpoint, tokens=ids).tokenizer is None


@pytest.mark.parametrize("text", ["{}", "", "[]", '{"model": 3}', "\xff"])
def test_a_broken_tokenizer_is_only_needed_for_text(checkpoint: Path, ids: Path, text: str) -> None:
    (checkpoint / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer: .*; give token ids"):
        read(checkpoint)
    assert read(checkpoint, tokens=ids).tokenizer is None


BAD_BOS: dict[str, dict[str, Any]] = {
    "add_bos_token is 'yes', expected true or false": {"add_bos_token": "yes"},
    "add_bos_token is '1', expected true or false": {"add_bos_token": 1},
    "bos_token is 'None', expected a string": {"bos_token": None},
    "bos_token is '7', expected a string": {"bos_token": 7},
    "bos_token is '{}', expected a string": {"bos_token": {}},
    "bos_token is '<s>', expected a token of tokenizer.json": {"bos_token": "<s>"},
}


@pytest.mark.parametrize("message", BAD_BOS)
def test_a_configuration_that_contradicts_itself(deepseek: Path, message: str) -> None:
    edit(deepseek / "tokenizer_config.json", bos_token=BOS)
    assert read(deepseek).batch_BL[0, 0] == 0
    edit(deepseek / "tokenizer_config.json", **BAD_BOS[message])
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: .*{message}"):
        read(deepseek)
