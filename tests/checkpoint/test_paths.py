"""Which files of a directory are opened, which travel, and that nothing in it is ever run."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from pathlib import Path

import pytest

from dsv3_tools.checkpoint.paths import hub_blob_sha256, read_small_file, regular_file, side_files
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.errors import CheckpointError

TRAVEL = [
    *("LICENSE", "LICENSE-MODEL", "README.txt", "chat_template.jinja", "configuration_deepseek.py"),
    *("generation_config.json", "modeling_deepseek.py", "special_tokens_map.json", "tiktoken.model"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
]
STAY = [
    "consolidated.safetensors",
    *(".gitattributes", "README.md", "a.bin", "a.ckpt", "a.pickle", "a.pkl", "a.pt", "a.pth", "a.sh", "a.so"),
    *("hf_quant_config.json", "quant_cfg.json", "quant_model_description.json", "quantize_config.json"),
    *(
        "tokenizer.bin",
        "tokenizer.BIN",
        "tokenizer.Pickle",
        "tokenizer.pkl",
        "tokenizer.pt",
        "training_args.bin",
    ),
    *("dsv3_figures.json", "dsv3_manifest.json", "model.gguf", "pytorch_model.bin.index.html"),
]
SHARDS = ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"]
NEITHER = ["config.json", "model.safetensors.index.json", *SHARDS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in [*TRAVEL, *STAY, *NEITHER]:
        (folder / name).write_bytes(b"{}")
    return folder


def test_what_travels_and_what_stays(folder: Path) -> None:
    (folder / "assets").mkdir()
    assert side_files(folder, SHARDS) == (sorted(TRAVEL), sorted([*STAY, "assets/"]))


def test_special_files_stay_and_are_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "fifo.json")
    (folder / "folder.json").mkdir()
    (folder / "dangling.json").symlink_to("nowhere")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "a\nb.json").write_bytes(b"")
    (folder / "a\x1b[31m.json").write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.json"))
    extra = [
        "fifo.json",
        "folder.json/",
        "dangling.json",
        "loop.json",
        "a\nb.json",
        "a\x1b[31m.json",
        "socket.json",
    ]
    assert side_files(folder, SHARDS) == (
        sorted(TRAVEL),
        sorted([*STAY, *extra], key=lambda name: name.rstrip("/")),
    )


@pytest.mark.parametrize("target", ["../outside.json", "/etc/hostname"])
def test_a_side_file_that_is_a_link_out_is_refused(folder: Path, target: str) -> None:
    (folder.parent / "outside.json").write_text("{}")
    (folder / "extra.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"extra\.json: is a link to .*, outside the checkpoint"):
        side_files(folder, SHARDS)


def test_a_link_inside_travels(folder: Path) -> None:
    (folder / "extra.json").symlink_to("tokenizer.json")
    assert "extra.json" in side_files(folder, SHARDS)[0]
    assert regular_file(folder, "extra.json") == (folder / "tokenizer.json").resolve()


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_nothing_in_the_directory_is_imported_or_unpickled(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An audit hook sees every open, import and unpickling; the control sees the same by itself."""
    monkeypatch.chdir(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    for name in ("json.py", "torch.py", "sitecustomize.py", "conftest.py"):
        (checkpoint / name).write_text("raise SystemExit('imported from the model directory')\n")
    events: list[tuple[str, str]] = []
    listening = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event in ("import", "pickle.find_class", "exec", "compile", "open"):
            events.append((event, str(arguments[0])))

    sys.addaudithook(hook)
    try:
        with Checkpoint(checkpoint) as opened:
            for name in opened.specs:
                opened.read_bytes(name)
        travel, stay = side_files(checkpoint, {path.name for path in checkpoint.glob("*.safetensors")})
        for name in travel:
            read_small_file(checkpoint, name, 1000)
        ours, events = events, []
        pickle.loads((checkpoint / "pytorch_model.bin").read_bytes())
    finally:
        listening = False

    assert {"modeling_small.py", "json.py"} <= set(travel)
    assert "pytorch_model.bin" in stay
    assert not [event for event in ours if event[0] in ("pickle.find_class", "exec", "compile")]
    opened_files = {Path(name).name for event, name in ours if event == "open"}
    assert "config.json" in opened_files
    assert "pytorch_model.bin" not in opened_files
    assert not (checkpoint / "__pycache__").exists()
    assert "modeling_small" not in sys.modules
    assert ("pickle.find_class", "posix") in events, "the control was not seen"
    assert (checkpoint / "unpickled").exists()


def test_read_small_file(folder: Path) -> None:
    (folder / "a.json").write_bytes(b"x" * 100)
    assert read_small_file(folder, "a.json", 100) == b"x" * 100
    with pytest.raises(CheckpointError, match=r"a\.json: more than 99 bytes"):
        read_small_file(folder, "a.json", 99)
    for name in ("missing.json", "", ".", "tokenizer.json/x"):
        with pytest.raises(CheckpointError):
            read_small_file(folder, name, 100)


def test_the_hash_in_a_blobs_name(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    large, small = "0123456789abcdef" * 4, "0123456789abcdef0123456789abcdef01234567"
    for name, blob in [("a.safetensors", large), ("config.json", small)]:
        (blobs / blob).write_bytes(b"")
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    (snapshot / large).write_bytes(b"")
    assert hub_blob_sha256(snapshot, "a.safetensors") == large
    assert hub_blob_sha256(snapshot, "config.json") is None
    assert hub_blob_sha256(snapshot, large) is None, "only a blob's name is a hash"
    assert hub_blob_sha256(snapshot, "missing") is None
    assert hub_blob_sha256(blobs, large) is None
