"""What is printed where: results on stdout, the rest on stderr, nothing animated, nothing interpreted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tools.cli import output, progress
from dsv3_tools.conversion.progress import Progress

HOSTILE = "[red]a[/0] \x1b[31mb\r\nc\u202ed \udcff"
SHOWN = r"[red]a[/0] \x1b[31mb\r\nc\u202ed \udcff"


def commands(fp8: Path, bf16: Path, folder: Path) -> list[list[str | Path]]:
    """Every command, run for real."""
    return [
        ["inspect", fp8],
        ["convert", "fp8-to-bf16", fp8, folder / "bf16", "--dry-run"],
        ["convert", "fp8-to-bf16", fp8, folder / "bf16"],
        ["convert", "fp8-to-bf16", fp8, folder / "bf16"],
        ["convert", "bf16-to-fp8", bf16, folder / "fp8", "--like", fp8, "--dry-run"],
        ["convert", "bf16-to-fp8", bf16, folder / "fp8", "--like", fp8],
        ["quantize", "int8", fp8, folder / "int8"],
        ["quantize", "int4", fp8, folder / "int4", "--group-size", "32", "--dry-run"],
        ["quantize", "int4", fp8, folder / "int4", "--group-size", "32"],
        ["convert", "int8-to-bf16", folder / "int8", folder / "int8-bf16"],
        ["convert", "int4-to-bf16", folder / "int4", folder / "int4-bf16"],
        ["check", folder / "int4"],
        ["verify", "integrity", bf16],
        ["verify", "integrity", fp8],
        ["verify", "structure", fp8],
        ["verify", "structure", folder / "int4", "--no-data"],
        ["verify", "tensors", fp8, bf16],
        ["verify", "tensors", fp8, folder / "int4", "--sample", "5%"],
        ["sample", folder / "sample", "--sparse", "--layers", "2", "--experts", "4"],
    ]


def test_results_are_on_stdout_as_plain_text(
    dsv3, fp8_checkpoint: Path, bf16_checkpoint: Path, tmp_path: Path
) -> None:
    for command in commands(fp8_checkpoint, bf16_checkpoint, tmp_path):
        outcome = dsv3(*command)
        assert (outcome.code, outcome.err) == (0, ""), command
        assert outcome.out.endswith("\n")
        assert "\x1b" not in outcome.out
        assert "\r" not in outcome.out


def test_json_is_one_document_on_stdout(
    dsv3, fp8_checkpoint: Path, bf16_checkpoint: Path, tmp_path: Path
) -> None:
    for command in commands(fp8_checkpoint, bf16_checkpoint, tmp_path):
        outcome = dsv3(*command, "--json")
        assert (outcome.code, outcome.err) == (0, ""), command
        assert outcome.document
        assert outcome.out.isascii()


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}], ids=str)
@pytest.mark.parametrize(
    "command", [["--help"], ["inspect", "--help"], ["inspect", "x"], ["inspect"]], ids=str
)
def test_nothing_is_coloured_or_moves_when_piped(
    dsv3_process, command: list[str], variables: dict[str, str]
) -> None:
    outcome = dsv3_process(*command, **variables)
    assert "\x1b" not in outcome.out + outcome.err


def on_a_terminal(command: list[str], **variables: str) -> bytes:
    """Returns what a command prints to a terminal."""
    leader, follower = os.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | variables
    done = subprocess.run(
        [sys.executable, "-c", "from dsv3_tools.cli import main; main()", *command],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        timeout=60,
        check=False,
    )
    os.close(follower)
    assert done.returncode == 0
    text = b""
    try:
        while block := os.read(leader, 65536):
            text += block
    except OSError:  # Linux says EIO once the other side is closed
        pass
    os.close(leader)
    return text


def test_no_color_is_honoured_on_a_terminal() -> None:
    """With its negative control: without the variable there is colour."""
    variables = {"TERM": "xterm-256color", "COLUMNS": "80"}
    assert b"\x1b[3" in on_a_terminal(["verify", "--help"], **variables)
    assert b"\x1b[3" not in on_a_terminal(["verify", "--help"], NO_COLOR="1", **variables)


def test_a_bar_on_a_terminal(bf16_checkpoint: Path) -> None:
    assert b"ok: " in on_a_terminal(["verify", "integrity", str(bf16_checkpoint)], TERM="xterm")


@pytest.mark.parametrize(
    "name", [HOSTILE, "plain  two spaces", "[bold]x[/bold]", "\x00\x07\x9b1m", "é 中 \U0001f600"]
)
def test_names_are_shown_as_text(capsys: pytest.CaptureFixture[str], name: str) -> None:
    output.print_line(name)
    output.print_note(name)
    output.print_table([(name, "1"), ("a", "22")])
    output.print_error(name, 1, as_json=False)
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert len(captured.err.splitlines()) == 2
    for text in captured.out + captured.err:
        assert text == "\n" or text.isprintable()
    expected = (
        SHOWN if name == HOSTILE else name.encode("unicode_escape").decode() if "\x00" in name else name
    )
    assert captured.out.splitlines()[0] == expected
    assert captured.err.splitlines()[1] == f"dsv3: {expected}"


@given(st.text())
def test_json_survives_every_text(text: str) -> None:
    assert json.loads(json.dumps(output.as_json({text: [text]}))) == {text: [text]}


def test_hostile_paths_and_names(dsv3, fp8_checkpoint: Path, tmp_path: Path) -> None:
    """A directory, a tensor and a side file with markup and escape codes: shown, never interpreted."""
    hostile = tmp_path / "[red]a[0]\x1b[31m\nb"
    shutil.copytree(fp8_checkpoint, hostile)
    (hostile / "x[b]\x1b]0;title\x07.bin").write_text("")
    shown = r"[red]a[0]\x1b[31m\nb"
    found = dsv3("inspect", hostile)
    assert found.code == 0
    assert found.out.splitlines()[0].startswith(f"{tmp_path}/{shown}: deepseek_v3")
    assert r"odd: pickle files, never opened nor copied: x[b]\x1b]0;title\x07.bin" in found.out
    done = dsv3("convert", "fp8-to-bf16", hostile, tmp_path / "out")
    assert (done.code, "\x1b" in done.out) == (0, False)
    assert r"files left behind: x[b]\x1b]0;title\x07.bin" in done.out
    (hostile / "config.json").unlink()
    assert shown in dsv3("inspect", hostile).error_line


def test_names_that_a_terminal_cannot_show(dsv3_process, fp8_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "é").symlink_to(fp8_checkpoint)
    found = dsv3_process("inspect", tmp_path / "é", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith(f"{tmp_path}/\\xe9: deepseek_v3")


def test_hostile_tensor_names(dsv3, copied: Callable[[Path], Path], fp8_checkpoint: Path) -> None:
    import safetensors.torch as st_torch
    import torch

    checkpoint = copied(fp8_checkpoint)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    for name in ("model.[red]x[0].weight", "[]"):
        shard = f"extra-{len(index['weight_map'])}.safetensors"
        st_torch.save_file({name: torch.zeros(2)}, checkpoint / shard)
        index["weight_map"][name] = shard
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    found = dsv3("inspect", checkpoint)
    assert found.code == 0
    assert "odd: 2 tensors do not belong to the model: [], model.[red]x[0].weight" in found.out
    refused = dsv3("convert", "fp8-to-bf16", checkpoint, checkpoint.with_name("out"))
    assert refused.code == 3
    assert "model.[red]x[0].weight is not a tensor of this family" in refused.error_line

    for number, (name, shown) in enumerate(
        [("model.\x1b[31m", r"model.\x1b[31m"), ("[red][/0]", "[red][/0]")]
    ):
        shard = f"refused-{number}.safetensors"
        st_torch.save_file({name: torch.zeros(2)}, checkpoint / shard)
        listed = {"weight_map": index["weight_map"] | {name: shard}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(listed))
        refused = dsv3("inspect", checkpoint)
        assert refused.code == 3
        assert shown in refused.error_line


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--json"], ["--help"], ["--version"]], ids=str)
def test_a_reader_that_leaves(fp8_checkpoint: Path, command: list[str], unbuffered: str) -> None:
    """`dsv3 inspect DIR | true`: no complaint, the exit code of a closed pipe."""
    arguments = [*command, str(fp8_checkpoint)] if command[0] == "inspect" else command
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", "from dsv3_tools.cli import main; main()", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_first_line_alone(fp8_checkpoint: Path) -> None:
    main = f"{sys.executable} -c 'from dsv3_tools.cli import main; main()'"
    done = subprocess.run(
        ["bash", "-c", f"{main} inspect {fp8_checkpoint} | head -1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.shown_progress("fp8-to-bf16") as update:
        for _ in range(241):
            update(Progress(int((now - 1000) * 1e9), int(600e9), int(now - 1000) // 10, 60))
            now += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == ("fp8-to-bf16: 60.00 GB of 600.00 GB, 6 of 60 shards, 1.00 GB/s, 9 minutes left")


def test_a_minute_in_which_nothing_was_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.shown_progress("x") as update:
        now = 61.0
        update(Progress(0, 0, 1, 2))
    assert "1 of 2 shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (688_574_839_360, "688.57 GB"),
        (1_368_979_721_216, "1.37 TB"),
        (-2e6, "-2.00 MB"),
    ],
)
def test_size(nbytes: float, text: str) -> None:
    assert output.size(nbytes) == text


def test_tables_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table([])
    output.print_table([("1", "a", "10 bytes"), ("100", "bcd", "5 bytes")])
    assert capsys.readouterr().out == "    1  a    10 bytes\n  100  bcd   5 bytes\n"
