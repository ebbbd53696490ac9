"""Help, examples and shell completion: what a user meets first, quickly and truly."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dsv3_tools.cli import app

COMMANDS = {
    "card": ("card",),
    "check": ("check",),
    "inspect": ("inspect",),
    "push": ("push",),
    "sample": ("sample",),
    "convert fp8-to-bf16": ("convert", "fp8-to-bf16"),
    "convert bf16-to-fp8": ("convert", "bf16-to-fp8"),
    "convert int8-to-bf16": ("convert", "int8-to-bf16"),
    "convert int4-to-bf16": ("convert", "int4-to-bf16"),
    "quantize int8": ("quantize", "int8"),
    "quantize int4": ("quantize", "int4"),
    "convert to-deepseek-infer": ("convert", "to-deepseek-infer"),
    "split-mtp": ("split-mtp",),
    "merge-mtp": ("merge-mtp",),
    "verify integrity": ("verify", "integrity"),
    "verify logits": ("verify", "logits"),
    "verify mtp": ("verify", "mtp"),
    "verify structure": ("verify", "structure"),
    "verify tensors": ("verify", "tensors"),
}
GROUPS = ("convert", "quantize", "verify")
TOP_LEVEL = {name.partition(" ")[0] for name in COMMANDS}
HELPS = {"": ()} | {name: (name,) for name in GROUPS} | COMMANDS


def real_command(name: str) -> click.Command:
    found: click.Command = app.dsv3
    for part in COMMANDS[name]:
        assert isinstance(found, click.Group)
        found = found.commands[part]
    return found.load()  # type: ignore[attr-defined, no-any-return]


def leaves(group: click.Group, path: str = "") -> set[str]:
    found: set[str] = set()
    for name, command in group.commands.items():
        here = f"{path} {name}".strip()
        found |= leaves(command, here) if isinstance(command, click.Group) else {here}
    return found


def test_the_list_of_commands_here_is_complete() -> None:
    assert leaves(app.dsv3) == COMMANDS.keys()


@pytest.mark.parametrize("name", HELPS)
def test_help_shows_usage_and_every_option(dsv3, name: str) -> None:
    outcome = dsv3(*HELPS[name], "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Usage: dsv3 {name}".strip() in outcome.out
    assert dsv3(*HELPS[name], "-h").out == outcome.out
    if name in COMMANDS:
        for parameter in real_command(name).params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[0] in outcome.out
        assert "Example:" in outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_debug(name: str) -> None:
    options = {opt for parameter in real_command(name).params for opt in parameter.opts}
    assert {"--json", "--debug"} <= options


@pytest.mark.parametrize("name", HELPS)
def test_help_loads_nothing_heavy_and_is_quick(name: str) -> None:
    """The aim is 0.3 s, which needs a quiet machine; a test can count the CPU's time."""
    code = (
        "import sys, time\nfrom dsv3_tools.cli.app import run_command_line\n"
        f"assert run_command_line({[*HELPS[name], '--help']!r}) == 0\n"
        "assert {'torch', 'numba', 'triton'}.isdisjoint(sys.modules), 'heavy'\n"
        "print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 1.0


@pytest.mark.parametrize("group", ["", "convert", "verify"])
def test_a_group_alone_shows_its_help_and_is_a_usage_error(dsv3_process, group: str) -> None:
    outcome = dsv3_process(*HELPS[group])
    assert outcome.code == 2
    assert "Usage:" in outcome.out + outcome.err


def test_version(dsv3) -> None:
    import dsv3_tools

    assert dsv3("--version").out == f"dsv3, version {dsv3_tools.__version__}\n"


def examples(name: str) -> list[str]:
    text = re.sub(r"[\b]", "", real_command(name).help or "")
    return re.findall(r"^\s*dsv3 (.+)$", text[text.index("Example:") :], re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_of_that_command(name: str) -> None:
    assert examples(name)
    assert all(example.startswith(f"{name} ") for example in examples(name))


@pytest.mark.usefixtures("client")
def test_the_examples_run(dsv3, miniature: Path, tmp_path: Path) -> None:
    """In the order in which one leaves what the next one reads."""
    writing = ("convert fp8-to-bf16", "verify integrity", "convert bf16-to-fp8", "convert to-deepseek-infer")
    integers = ("quantize int8", "quantize int4", "convert int8-to-bf16", "convert int4-to-bf16")
    verifying = ("verify structure", "verify tensors", "verify logits", "verify mtp")
    halves = ("split-mtp", "merge-mtp")
    order = ("sample", "inspect", "check", *writing, "card", "push", *integers, *halves, *verifying)
    assert set(order) == COMMANDS.keys()
    for name in order:
        for example in examples(name):
            line = example.replace("/tmp/", f"{tmp_path}/")
            outcome = dsv3(*shlex.split(line.replace("miniature/checkpoint", str(miniature))))
            assert (outcome.code, outcome.err) == (0, ""), example
    made = {"mini-bf16", "mini-fp8", "mini-infer-mp4", "v3-headers"}
    made |= {"mini-W8A8", "mini-W8A8-bf16", "mini-W4A16", "mini-W4A16-bf16", "report.html"}
    made |= {"mini-noMTP", "mini-MTP", "mini-NextN", "mini-whole"}
    assert made == {path.name for path in tmp_path.iterdir()}


def test_what_the_first_help_page_says_runs(dsv3, fp8_checkpoint: Path, tmp_path: Path) -> None:
    lines = re.findall(r"^\s*dsv3 (.+)$", app.dsv3.help or "", re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        places = {"SRC": str(fp8_checkpoint), "DST": str(tmp_path / "out")}
        assert dsv3(*(places.get(word, word) for word in shlex.split(line))).code == 0
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(dsv3_process, shell: str) -> None:
    outcome = dsv3_process(_DSV3_COMPLETE=f"{shell}_source")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"_DSV3_COMPLETE={shell}_complete" in outcome.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["dsv3", ""],
            {
                *[
                    "card",
                    "check",
                    "convert",
                    "inspect",
                    "merge-mtp",
                    "push",
                    "quantize",
                    "sample",
                    "split-mtp",
                    "verify",
                ]
            },
        ),
        (["dsv3", "convert", "f"], {"fp8-to-bf16"}),
        (["dsv3", "verify", ""], {"integrity", "logits", "mtp", "structure", "tensors"}),
        (["dsv3", "convert", "bf16-to-fp8", "--s"], {"--scale-fmt"}),
        (["dsv3", "convert", "fp8-to-bf16", "--d"], {"--device", "--dry-run", "--debug"}),
        (["dsv3", "convert", "fp8-to-bf16", "--nonfinite", ""], {"error", "keep"}),
        (["dsv3", "sample", "x", "--preset", "k"], {"kimi-k2"}),
        (["dsv3", "z"], set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_completion_in_bash(dsv3_process, words: list[str], expected: set[str]) -> None:
    outcome = dsv3_process(
        _DSV3_COMPLETE="bash_complete", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1)
    )
    assert {line.partition(",")[2] for line in outcome.out.split()} == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_in_other_shells(dsv3_process, shell: str) -> None:
    number = "1" if shell == "zsh" else "ver"
    outcome = dsv3_process(_DSV3_COMPLETE=f"{shell}_complete", COMP_WORDS="dsv3 ver", COMP_CWORD=number)
    assert "verify" in outcome.out
    assert "inspect" not in outcome.out
