"""The functions of `dsv3_tools`: each is a command of the same name and keywords, and does what it does."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect as python_inspect
from pathlib import Path
from typing import Any

import click
import pytest

import dsv3_tools
from dsv3_tools import errors
from dsv3_tools.cli import card as card_command
from dsv3_tools.cli import check as check_command
from dsv3_tools.cli import convert as convert_commands
from dsv3_tools.cli import inspect as inspect_command
from dsv3_tools.cli import mtp as mtp_commands
from dsv3_tools.cli import push as push_command
from dsv3_tools.cli import quantize as quantize_commands
from dsv3_tools.cli import sample as sample_command
from dsv3_tools.cli import verify as verify_commands
from dsv3_tools.cli import verify_logits as verify_logits_command
from dsv3_tools.cli import verify_mtp as verify_mtp_command
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.progress import Progress, Stop

ROOT = Path(__file__).resolve().parents[1]

COMMANDS: dict[str, click.Command] = {
    "card": card_command.card,
    "check": check_command.check,
    "convert_bf16_to_fp8": convert_commands.bf16_to_fp8,
    "convert_fp8_to_bf16": convert_commands.fp8_to_bf16,
    "convert_to_deepseek_infer": convert_commands.to_deepseek_infer,
    "convert_int4_to_bf16": convert_commands.int4_to_bf16,
    "convert_int8_to_bf16": convert_commands.int8_to_bf16,
    "inspect": inspect_command.inspect,
    "merge_mtp": mtp_commands.merge_mtp,
    "push": push_command.push,
    "quantize_int4": quantize_commands.int4,
    "quantize_int8": quantize_commands.int8,
    "sample": sample_command.sample,
    "split_mtp": mtp_commands.split_mtp,
    "verify_integrity": verify_commands.integrity,
    "verify_logits": verify_logits_command.logits,
    "verify_mtp": verify_mtp_command.mtp,
    "verify_structure": verify_commands.structure,
    "verify_tensors": verify_commands.tensors,
}
ONLY_COMMANDS = {"as_json", "dry_run", "debug", "report"}
"""How a command prints, reports, and previews; a function returns and calls back instead."""
ONLY_FUNCTIONS = {"on_plan", "on_progress", "stop", "ranks", "overrides"}


def keywords(function: Any) -> dict[str, python_inspect.Parameter]:
    return dict(python_inspect.signature(function).parameters)


def default_of(option: click.Option, context: click.Context) -> Any:
    """What a command gets when the option is not given; click has a mark of its own for "no default"."""
    if option.required:
        return python_inspect.Parameter.empty
    value = option.get_default(context)
    if option.multiple:
        return ()
    return value if isinstance(value, (bool, int, float, str)) else None


@pytest.mark.parametrize("name", COMMANDS)
def test_keywords_are_the_commands_options(name: str) -> None:
    command, parameters = COMMANDS[name], keywords(getattr(dsv3_tools, name))
    arguments = [parameter.name for parameter in command.params if isinstance(parameter, click.Argument)]
    # Not make_context(): rich-click's contexts leave a console behind that swallows later help texts.
    context = click.Context(command)
    exposed = [parameter for parameter in command.params if parameter.expose_value]
    hidden = ONLY_COMMANDS - parameters.keys()
    options = [p for p in exposed if isinstance(p, click.Option) and p.name not in hidden]
    given = dict.fromkeys(arguments) | {p.name: default_of(p, context) for p in options}
    assert parameters.keys() - ONLY_FUNCTIONS == given.keys()
    for key, parameter in parameters.items():
        if key in arguments:
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, key
            continue
        assert parameter.kind is parameter.KEYWORD_ONLY, key
        if key in given:
            assert parameter.default == given[key], key


def test_every_command_is_a_function() -> None:
    functions = {name for name in dsv3_tools.__all__ if python_inspect.isfunction(getattr(dsv3_tools, name))}
    assert COMMANDS.keys() == functions


def test_everything_public_is_there() -> None:
    assert dir(dsv3_tools) == sorted(dsv3_tools.__all__)
    for name in dsv3_tools.__all__:
        found = getattr(dsv3_tools, name)
        assert isinstance(found, str) or found.__doc__
    assert dsv3_tools.__version__.count(".") == 2


def test_type_checkers_see_what_is_there() -> None:
    """The imports for type checkers and the table for the rest name the same homes."""
    tree = ast.parse((ROOT / "dsv3_tools" / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {a.name: n.module for n in checked.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert homes == dsv3_tools._HOMES
    assert homes.keys() == set(dsv3_tools.__all__) - {"__version__"}


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'dsv3_tools' has no attribute 'convert'"):
        dsv3_tools.convert  # noqa: B018
    with pytest.raises(ImportError):
        exec("from dsv3_tools import nothing")


@pytest.mark.parametrize("name", ["dsv3_tools", *sorted(set(dsv3_tools._HOMES.values()))])
@pytest.mark.usefixtures("client")
def test_docstring_examples_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", [*COMMANDS, "Checkpoint"])
def test_every_function_has_an_example_that_runs(name: str) -> None:
    tests = doctest.DocTestFinder(recurse=False).find(getattr(dsv3_tools, name), name)
    examples = [example for test in tests for example in test.examples]
    assert examples
    assert not any("SKIP" in example.source for example in examples)


def test_the_docstring_of_the_package_has_an_example() -> None:
    found = doctest.DocTestFinder().find(dsv3_tools, "dsv3_tools")
    assert sum(len(test.examples) for test in found) >= 3


def test_all_functions(fp8_checkpoint: Path, bf16_checkpoint: Path, tmp_path: Path) -> None:
    plans: list[Plan] = []
    seen: list[Progress] = []
    common: dict[str, Any] = {
        "device": "cpu",
        "workers": 2,
        "on_plan": plans.append,
        "on_progress": seen.append,
    }
    down = dsv3_tools.convert_fp8_to_bf16(
        str(fp8_checkpoint),
        str(tmp_path / "bf16"),
        max_shard_size=10**9,
        scale_semantics="multiply",
        **common,
    )
    assert (down.shards_written, down.already_complete, down.operation) == (1, False, "fp8-to-bf16")
    assert down.manifest == tmp_path / "bf16" / "dsv3_manifest.json"
    assert down.manifest.exists()
    assert plans[0].nbytes_out == down.nbytes_out
    assert seen[-1].nbytes_done == seen[-1].nbytes_total == down.nbytes_in
    assert (seen[-1].shards_done, seen[-1].shards_total) == (1, 1)

    up = dsv3_tools.convert_bf16_to_fp8(bf16_checkpoint, tmp_path / "fp8", like=fp8_checkpoint, **common)
    assert up.shards_written == 4
    for path in fp8_checkpoint.glob("*.safetensors"):
        assert (tmp_path / "fp8" / path.name).read_bytes() == path.read_bytes()

    again = dsv3_tools.convert_bf16_to_fp8(bf16_checkpoint, tmp_path / "fp8", like=fp8_checkpoint)
    assert (again.already_complete, again.shards_written, again.shards_resumed) == (True, 0, 4)
    assert dsv3_tools.verify_integrity(tmp_path / "fp8").passed
    assert dsv3_tools.inspect(tmp_path / "fp8").parameters == dsv3_tools.inspect(fp8_checkpoint).parameters


@pytest.mark.parametrize("weights", ["fp8", "fp8-ue8m0", "bf16"])
def test_samples_differ_by_their_seed_alone(tmp_path: Path, weights: str) -> None:
    options: dict[str, Any] = {"preset": "moonlight", "weights": weights, "layers": 1, "shards": 2}
    small = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 64, "num_attention_heads": 2}
    made = [
        dsv3_tools.sample(tmp_path / str(number), overrides=small, seed=seed, **options)
        for number, seed in enumerate((1, 1, 2))
    ]
    data = [b"".join(path.read_bytes() for path in sorted(m.destination.iterdir())) for m in made]
    assert data[0] == data[1] != data[2]
    with dsv3_tools.Checkpoint(made[0].destination) as checkpoint:
        assert len(checkpoint.specs) == made[0].num_tensors
        assert checkpoint.nbytes == made[0].nbytes
    quantization = dsv3_tools.inspect(made[0].destination).quantization
    expected = {"fp8": None, "fp8-ue8m0": "ue8m0"}
    assert (quantization or {}).get("scale_fmt") == expected.get(weights)
    assert (quantization is None) == (weights == "bf16")


def test_a_run_can_be_stopped_and_goes_on(
    fp8_checkpoint: Path, bf16_checkpoint: Path, tmp_path: Path
) -> None:
    stop = Stop()
    out = tmp_path / "out"

    def after_the_first_shard(progress: Progress) -> None:
        if progress.shards_done:
            stop.set(15)

    with pytest.raises(errors.Interrupted) as caught:
        dsv3_tools.convert_fp8_to_bf16(
            fp8_checkpoint, out, workers=1, stop=stop, on_progress=after_the_first_shard
        )
    assert caught.value.exit_code == 143
    with pytest.raises(errors.CheckpointError, match="has not finished"):
        dsv3_tools.inspect(out)
    result = dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, out)
    assert (result.shards_resumed, result.shards_written) == (1, 3)
    for path in bf16_checkpoint.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_bad_arguments(fp8_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="nonfinite: got 'drop'"):
        dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, tmp_path / "out", nonfinite="drop")
    with pytest.raises(errors.UsageError, match="preset 'gpt-2'"):
        dsv3_tools.sample(tmp_path / "out", preset="gpt-2")
    with pytest.raises(errors.UsageError, match="weights 'int4'"):
        dsv3_tools.sample(tmp_path / "out", weights="int4")
    with pytest.raises(TypeError):
        dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, tmp_path / "out", "cpu")  # type: ignore[misc]
    assert list(tmp_path.iterdir()) == []


def test_the_tree_of_errors_is_that_of_its_docstring() -> None:
    assert errors.__doc__ is not None
    drawn = {}
    for line in errors.__doc__.splitlines():
        words = line.replace("│", " ").replace("├──", " ").replace("└──", " ").split()
        if words and words[0] in errors.__all__ and "exit" in words:
            drawn[words[0]] = words[words.index("exit") + 1]
    classes = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert classes == drawn.keys() | {"Dsv3Error"}
    for name, code in drawn.items():
        kind = getattr(errors, name)
        assert issubclass(kind, errors.Dsv3Error)
        if name == "Interrupted":
            assert (code, kind(15, "stopped").exit_code) == ("128", 143)
        else:
            assert kind.exit_code == int(code), name
    assert issubclass(errors.HeaderError, errors.CheckpointError)
    assert errors.Dsv3Error.exit_code == 1
