"""Every command refuses every damaged checkpoint: one line, exit code 3, nothing written."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def load_corruptions() -> ModuleType:
    """Returns `tests/checkpoint/corruptions.py`, which has no package to be imported from."""
    path = Path(__file__).parents[1] / "checkpoint" / "corruptions.py"
    spec = importlib.util.spec_from_file_location("corruptions_for_commands", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CORRUPTIONS = load_corruptions().CORRUPTIONS
IN_A_PROCESS = (
    "shard_is_fifo",
    "header_nesting_bomb",
    "index_hostile_name",
    "config_surrogate",
    "shard_is_device",
)

COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "BAD"],
    "check": ["check", "BAD"],
    "fp8-to-bf16": ["convert", "fp8-to-bf16", "BAD", "OUT"],
    "dry run": ["convert", "fp8-to-bf16", "BAD", "OUT", "--dry-run"],
    "bf16-to-fp8": ["convert", "bf16-to-fp8", "BAD", "OUT"],
    "like": ["convert", "bf16-to-fp8", "BF16", "OUT", "--like", "BAD"],
    "quantize int8": ["quantize", "int8", "BAD", "OUT"],
    "int8-to-bf16": ["convert", "int8-to-bf16", "BAD", "OUT"],
    "split-mtp": ["split-mtp", "BAD", "--main", "OUT", "--mtp", "OUT2", "--allow-different-shared"],
    "merge-mtp": ["merge-mtp", "BAD", "MTP", "OUT", "--allow-different-shared"],
    "merge-mtp with it": ["merge-mtp", "MAIN", "BAD", "OUT", "--allow-different-shared"],
    "verify integrity": ["verify", "integrity", "BAD"],
    "verify structure": ["verify", "structure", "BAD"],
    "verify tensors": ["verify", "tensors", "BF16", "BAD"],
    "verify mtp": ["verify", "mtp", "BAD", "--tokens", "TOKENS", "--min-acceptance", "0"],
    "verify logits": ["verify", "logits", "BF16", "BAD", "--tokens", "TOKENS", "--no-baseline"],
}
ANSWERING = ("verify integrity", "verify structure", "verify tensors", "verify logits")
"""Commands that may say that a checkpoint is wrong, instead of that they cannot read it."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "model"
    load_corruptions().make_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def pristine_bf16(pristine: Path) -> Path:
    import dsv3_tools

    path = pristine.with_name("model-bf16")
    dsv3_tools.convert_fp8_to_bf16(pristine, path)
    main, mtp = path.with_name("main"), path.with_name("mtp")
    dsv3_tools.split_mtp(pristine, main=main, mtp=mtp, allow_different_shared=True)
    return path


def command_line(command: str, bad: Path, bf16: Path, out: Path) -> list[str]:
    tokens = bf16.with_name("tokens.npy")
    np.save(tokens, np.arange(8))
    places = {"BAD": str(bad), "BF16": str(bf16), "OUT": str(out), "TOKENS": str(tokens)}
    places |= {"MAIN": str(bf16.with_name("main")), "MTP": str(bf16.with_name("mtp")), "OUT2": f"{out}2"}
    return [places.get(word, word) for word in COMMANDS[command]]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_refused_by_every_command(
    dsv3, pristine: Path, pristine_bf16: Path, tmp_path: Path, name: str
) -> None:
    bad, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(pristine, bad)
    CORRUPTIONS[name](bad)
    for command in COMMANDS:
        for options in ([], ["--json"]):
            began = time.monotonic()
            outcome = dsv3(*command_line(command, bad, pristine_bf16, out), *options)
            assert time.monotonic() - began < 20, command
            assert outcome.code in ((3, 4) if command in ANSWERING else (3,)), (command, outcome)
            assert outcome.error_line.isprintable()
            if options:
                assert outcome.document
            assert not out.exists()


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_refused_in_a_process(
    dsv3_process, pristine: Path, pristine_bf16: Path, tmp_path: Path, name: str
) -> None:
    bad, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(pristine, bad)
    CORRUPTIONS[name](bad)
    outcome = dsv3_process(*command_line("fp8-to-bf16", bad, pristine_bf16, out))
    assert outcome.code == 3
    assert outcome.error_line.isprintable()
    assert not out.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_negative_control_the_right_checkpoint_is_not_refused(
    dsv3, pristine: Path, pristine_bf16: Path, tmp_path: Path, command: str
) -> None:
    bad = pristine_bf16 if command == "bf16-to-fp8" else pristine
    if command == "int8-to-bf16":
        import dsv3_tools

        bad = tmp_path / "int8"
        dsv3_tools.quantize_int8(pristine, bad)
    if command.startswith("merge-mtp"):
        bad = pristine_bf16.with_name("main" if command == "merge-mtp" else "mtp")
    outcome = dsv3(*command_line(command, bad, pristine_bf16, tmp_path / "out"))
    assert (outcome.code, outcome.err) == (0, "")
