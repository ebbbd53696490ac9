"""Small checkpoints, every command that writes one, and the tools that interrupt and examine a run.

The tests live in files without a package, so what they share comes as fixtures.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools
from dsv3_tools.checkpoint import durable
from dsv3_tools.checkpoint.index import INDEX_NAME
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME
from dsv3_tools.conversion.executor import RunResult
from dsv3_tools.conversion.workspace import Workspace

# Partial blocks in both directions, three shards, about 300 kB: a run takes some 30 ms.
TINY: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "vocab_size": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
SIDE_FILES = {
    "tokenizer.json": b'{"version": "1.0"}\n',
    "generation_config.json": b'{"temperature": 0.6}\n',
    "chat_template.jinja": b"{{ messages }}\n",
    "modeling_deepseek.py": b"raise SystemExit('imported from a model directory')\n",
}
WRITE_SIDE = ("open", "pwrite", "write", "fsync", "rename", "unlink", "ftruncate", "mkdir", "rmdir")
READ_SIDE = ("preadv", "posix_fadvise", "scandir")

Hook = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Killed(BaseException):
    """What a run gets in the place of a call after its end."""


@dataclass(frozen=True)
class Case:
    """One conversion from one source; `expected` is what an uninterrupted run writes.

    `like` is the second checkpoint that a command reads, `output` which of its results the case is about.
    """

    operation: str
    source: Path
    like: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, bytes] = field(default_factory=dict)
    output: str | None = None

    @property
    def source_kind(self) -> str:
        """What the source's quantized weights are: "fp8", "int8", "int4", or "bf16" if there are none."""
        first, _, second = self.operation.partition(" ")
        return "fp8" if first.endswith("mtp") or first == "quantize" else second.partition("-")[0]

    def convert(self, destination: Path, **options: Any) -> RunResult:
        """Runs the command's function on the CPU, with one worker unless told otherwise."""
        options = {"device": "cpu", "workers": 1} | self.options | options
        function = getattr(dsv3_tools, self.operation.replace(" ", "_").replace("-", "_"))
        if self.operation == "merge-mtp":
            merged: RunResult = function(self.source, self.like, destination, **options)
            return merged
        if self.output is not None:
            halves = function(self.source, **{self.output: destination}, **options)
            half: RunResult = getattr(halves, self.output)
            return half
        if self.like is not None:
            options["like"] = self.like
        result: RunResult = function(self.source, destination, **options)
        return result

    def arguments(self, destination: Path) -> list[str]:
        """Returns the arguments of `dsv3` for the same."""
        given = {"device": "cpu"} | self.options
        places = [str(self.source), str(destination)]
        if self.operation == "merge-mtp":
            places.insert(1, str(self.like))
        elif self.like is not None:
            given["like"] = self.like
        if self.output is not None:
            given[self.output] = places.pop()
        flags = [flag for key, value in given.items() for flag in _flag(key.replace("_", "-"), value)]
        return [*self.operation.split(), *places, *flags]

    def with_own_source(self, folder: Path) -> Case:
        """Returns the case over copies of its sources, with the same times, that a test may damage."""
        like = None if self.like is None else Tools.copy(self.like, folder / "like")
        return replace(self, source=Tools.copy(self.source, folder / "source"), like=like)


def _flag(name: str, value: Any) -> list[str]:
    if value is False:
        return ["--asymmetric" if name == "symmetric" else f"--no-{name}"]
    return [f"--{name}", str(value)]


class Tools:
    """Functions that several test files use."""

    index = INDEX_NAME
    manifest = MANIFEST_NAME
    write_side = WRITE_SIDE
    read_side = READ_SIDE
    tiny = TINY

    @staticmethod
    def make(folder: Path, *, layers: int = 2, experts: int = 2, shards: int = 3, **options: Any) -> Path:
        """Makes a small checkpoint with the files that lie beside one."""
        overrides = TINY | options.pop("overrides", {})
        dsv3_tools.sample(
            folder, layers=layers, experts=experts, shards=shards, overrides=overrides, **options
        )
        for name, data in SIDE_FILES.items():
            (folder / name).write_bytes(data)
        (folder / "optimizer.bin").write_bytes(b"stays behind")
        return folder

    @staticmethod
    def copy(source: Path, folder: Path) -> Path:
        """Copies a directory, times included."""
        return Path(shutil.copytree(source, folder, copy_function=shutil.copy2))

    @staticmethod
    def snapshot(folder: Path) -> dict[str, bytes]:
        """Returns the bytes of every file below `folder`, empty folders as names that end in a slash."""
        found = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file():
                found[name] = path.read_bytes()
            elif not any(path.iterdir()):
                found[name + "/"] = b""
        return found

    @staticmethod
    def is_same(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
        """Returns how two snapshots differ; empty when they don't."""
        parts = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
        parts += [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
        both = sorted(found.keys() & expected.keys())
        parts += [f"{name} differs" for name in both if found[name] != expected[name]]
        return "; ".join(parts)

    @staticmethod
    def violations(destination: Path, expected: dict[str, bytes]) -> str:
        """Returns what is wrong with an unfinished destination: nothing incomplete has a final name."""
        if not destination.exists():
            return ""
        found = {n: d for n, d in Tools.snapshot(destination).items() if not n.startswith(".dsv3/")}
        problems = []
        for name, data in found.items():
            if name not in expected:
                problems.append(f"{name} is not part of the result")
            elif data != expected[name]:
                problems.append(f"{name} is incomplete")
        before_index = set(expected) - {INDEX_NAME, MANIFEST_NAME}
        if INDEX_NAME in found and not before_index <= found.keys():
            problems.append(f"the index is there before {sorted(before_index - found.keys())}")
        if MANIFEST_NAME in found and INDEX_NAME not in found:
            problems.append("the manifest is there before the index")
        return "; ".join(problems)

    @staticmethod
    def journalled(destination: Path) -> dict[str, tuple[int, int]]:
        """Returns inode and time of every shard that the journal says is finished."""
        return {name: Tools.identity(destination / name) for name in Workspace(destination).read_journal()}

    @staticmethod
    def state(folder: Path) -> dict[Path, tuple[int, ...]]:
        """Returns what tells whether anything below `folder` has changed: inodes, sizes and times."""
        found = {}
        for path in (folder, *folder.rglob("*")):
            with suppress(FileNotFoundError):  # the folder itself
                status = path.lstat()
                found[path] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return found

    @staticmethod
    def identity(path: Path) -> tuple[int, int]:
        """Returns a file's inode and time, which change when it is written again; zeros without a file."""
        status = path.stat() if path.exists() else None
        return (0, 0) if status is None else (status.st_ino, status.st_mtime_ns)

    @staticmethod
    @contextmanager
    def interposed(hook: Hook, names: tuple[str, ...] = WRITE_SIDE) -> Iterator[None]:
        """Lets `hook(name, real function, args, kwargs)` stand in for functions of `os`."""
        real = {name: getattr(os, name) for name in names}

        def stand_in(name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: hook(name, real[name], args, kwargs)

        try:
            for name in names:
                setattr(os, name, stand_in(name))
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    @staticmethod
    def unsynced(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls through, but for fsync: it decides nothing when only the process dies."""
        return None if name == "fsync" else real(*args, **kwargs)

    @staticmethod
    def convert_quickly(case: Case, destination: Path, **options: Any) -> RunResult:
        """Runs a conversion without waiting for the disk."""
        with Tools.interposed(Tools.unsynced, ("fsync",)):
            return case.convert(destination, **options)

    @staticmethod
    def in_child(act: Callable[[], Any], *, kill_after: float | None = None) -> int:
        """Runs `act` in a forked child; returns 0, 1 after an exception, or minus the signal."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # no other thread runs: pools are joined
            child = os.fork()
        if child == 0:
            gc.disable()  # a collection would write to every object, and so copy the parent's memory
            torch.set_num_threads(1)  # two threads that first meet torch's pool after a fork can find it gone
            try:
                act()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise TimeoutError("the child hung")

    @staticmethod
    def killed_at(
        case: Case,
        destination: Path,
        when: Callable[[int, str, tuple[Any, ...]], bool],
        *,
        torn: bool = False,
        names: tuple[str, ...] = WRITE_SIDE,
        really: bool = False,
        **options: Any,
    ) -> bool:
        """Ends a conversion before the call that `when` picks, as a kill does; returns whether there was one.

        With `torn` half of the data of that call is written first. Of a killed process the disk keeps what
        was there at that moment. So from then on no thread's call changes the disk any more, and the run
        comes to an end in this process: a fork takes longer than a conversion. `really` sends SIGKILL to a
        fork; `test_kill.py` holds one against the other.
        """
        calls, turn, dead = iter(range(1, 1_000_000)), threading.Lock(), []
        libc_function = durable._libc_function

        def hook(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with turn:  # no call of another thread is on its way when this one is the last
                if not dead and name in names and when(next(calls), name, args):
                    if torn and name in ("pwrite", "write"):
                        real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                    if really:
                        os.kill(os.getpid(), signal.SIGKILL)
                    dead.append(Tools.state(destination))
                if not dead:
                    return Tools.unsynced(name, real, args, kwargs)
            if name in ("open", "pwrite", "write"):
                raise Killed
            return None  # cleaning up, which does nothing

        def stand_in_of_libc(*described: Any) -> Any:
            real = libc_function(*described)

            def call(*args: Any) -> Any:
                with turn:
                    if dead:
                        raise Killed
                    return real(*args)

            return real and call

        def act() -> None:
            with pytest.MonkeyPatch.context() as patch, Tools.interposed(hook):
                patch.setattr(durable, "_libc_function", stand_in_of_libc)
                case.convert(destination, **options)

        if really:
            code = Tools.in_child(act)
            assert code in (0, -signal.SIGKILL), "the run failed by itself"
            return code != 0
        try:
            act()
        except BaseException:
            if not dead:
                raise
        assert not dead or dead == [Tools.state(destination)], "the run went on after its end"
        return bool(dead)

    @staticmethod
    def killed_before_last_shard(case: Case, destination: Path, **options: Any) -> None:
        """Leaves a destination with all shards but the last one in its journal."""
        last = sorted(name for name in case.expected if name.endswith(".safetensors"))[-1]

        def opens_last(number: int, name: str, args: tuple[Any, ...]) -> bool:
            return name == "open" and Path(os.fsdecode(args[0])).name.startswith(last + ".")

        assert Tools.killed_at(case, destination, opens_last, **options)

    @staticmethod
    def count_calls(case: Case, destination: Path, names: tuple[str, ...] = WRITE_SIDE) -> int:
        """Returns how many such calls an uninterrupted run makes; removes what it wrote."""
        calls: list[str] = []

        def hook(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(name)
            return Tools.unsynced(name, real, args, kwargs)

        with Tools.interposed(hook, names):
            case.convert(destination)
        shutil.rmtree(destination)
        return len(calls)

    @staticmethod
    def poke(folder: Path, tensor: str, element: int, data: bytes) -> None:
        """Overwrites one element of a tensor on disk."""
        with dsv3_tools.Checkpoint(folder) as checkpoint:
            shard, offset = checkpoint.location(tensor)
        with (folder / shard).open("r+b") as file:
            file.seek(offset + element * len(data))
            file.write(data)

    @staticmethod
    def edit(folder: Path, change: Callable[[dict[str, dict[str, torch.Tensor]]], Any]) -> None:
        """Lets `change` edit the tensors, by shard, and writes shards and index again."""
        shards = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        change(shards)
        for path in folder.glob("*.safetensors"):
            path.unlink()
        for shard, tensors in shards.items():
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    @staticmethod
    def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        """Lets `change` edit config.json."""
        path = folder / "config.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document, indent=2))


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    # A forked child must not wait for OpenMP threads that only its parent has.
    torch.set_num_threads(1)


COMMANDS: dict[str, dict[str, Any]] = {
    "quantize-int8": {"operation": "quantize int8"},
    "quantize-int4": {"operation": "quantize int4", "options": {"group_size": 32, "symmetric": False}},
    "quantize-int4-gptq": {"operation": "quantize int4", "options": {"group_size": 32, "layout": "gptq"}},
}
"""What is made of the FP8 checkpoint, beside its BF16 form; `test_determinism.py` has more of each."""

MTP_CASES = ("split-mtp", "merge-mtp")
CASES = (
    "fp8-to-bf16",
    "bf16-to-fp8",
    "bf16-to-fp8-like",
    *COMMANDS,
    "int8-to-bf16",
    "int4-to-bf16",
    *MTP_CASES,
)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every command on one tiny model; the BF16 one has a weight changed since it was FP8."""
    root = tmp_path_factory.mktemp("cases")
    fp8 = Tools.make(root / "fp8")
    first = Case("convert fp8-to-bf16", fp8)
    Tools.convert_quickly(first, root / "fp8-to-bf16")
    bf16 = Tools.copy(root / "fp8-to-bf16", root / "bf16")
    Tools.poke(bf16, "model.layers.1.mlp.experts.1.up_proj.weight", 3, b"\x00\x3f")  # 0.5
    whole = Tools.make(root / "whole", layers=5, overrides={"num_nextn_predict_layers": 1})
    for half in ("main", "mtp"):
        Tools.convert_quickly(Case("split-mtp", whole, output=half), root / half)
    made = {
        "fp8-to-bf16": first,
        "bf16-to-fp8": Case("convert bf16-to-fp8", bf16),
        "bf16-to-fp8-like": Case("convert bf16-to-fp8", bf16, like=fp8),
        **{name: Case(source=fp8, **what) for name, what in COMMANDS.items()},
        "int8-to-bf16": Case("convert int8-to-bf16", root / "quantize-int8"),
        "int4-to-bf16": Case("convert int4-to-bf16", root / "quantize-int4"),
        "split-mtp": Case(
            "split-mtp", whole, options={"layout": "sglang-nextn", "max_shard_size": 110_000}, output="mtp"
        ),
        "merge-mtp": Case("merge-mtp", root / "main", like=root / "mtp"),
    }
    for name, case in made.items():
        if not (root / name).exists():
            Tools.convert_quickly(case, root / name)
        made[name] = replace(case, expected=Tools.snapshot(root / name))
    assert made.keys() == set(CASES)
    return made


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def fp8_case(cases: dict[str, Case], tmp_path: Path) -> Case:
    """FP8 to BF16 over a source that the test may damage."""
    return cases["fp8-to-bf16"].with_own_source(tmp_path / "own")


@pytest.fixture
def bf16_case(cases: dict[str, Case], tmp_path: Path) -> Case:
    """BF16 to FP8 over a source that the test may damage."""
    return cases["bf16-to-fp8"].with_own_source(tmp_path / "own")


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that are the same in every run of a test."""
    return random.Random(request.node.nodeid)
