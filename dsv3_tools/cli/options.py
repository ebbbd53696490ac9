"""Options that several commands share, and the values that they parse."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click
from click.shell_completion import CompletionItem

from dsv3_tools.checkpoint.source import Source, parse_source
from dsv3_tools.conversion.hub_target import PushTarget

__all__ = [
    "DIRECTORY",
    "SIZE",
    "SOURCE",
    "TARGET",
    "calibration_options",
    "debug_option",
    "directory_argument",
    "fixed_shards_options",
    "forward_options",
    "json_option",
    "run_options",
    "selecting_options",
    "shared_option",
    "source_argument",
]

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", value)
        unit = _UNITS.get(match[2].upper()) if match is not None else None
        nbytes = int(Fraction(match[1]) * unit) if match is not None and unit is not None else 0
        if nbytes < 1:
            self.fail(f"{value!r} is not a size such as 5GB, 4GiB or 5000000000", param, ctx)
        return nbytes


SIZE = _Size()


class _Directory(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).startswith("hf:"):
            self.fail(f"{value!r} is on the Hub, expected a directory here; --push and dsv3 push upload")
        return super().convert(value, param, ctx)


DIRECTORY = _Directory(path_type=Path)


def directory_argument(name: str) -> Callable[[F], F]:
    """A directory; whether it is right is for the command to say."""
    return click.argument(name, type=DIRECTORY)


class _Source(click.ParamType):  # type: ignore[type-arg]
    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Source:
        del param, ctx
        return parse_source(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del ctx, param
        return [CompletionItem(incomplete, type="dir")]


SOURCE = _Source()


class _Target(click.ParamType):  # type: ignore[type-arg]
    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PushTarget:
        del param, ctx
        return value if isinstance(value, PushTarget) else PushTarget.parse(value)


TARGET = _Target()


def source_argument(name: str) -> Callable[[F], F]:
    """A checkpoint to read: a directory, or a model on the Hub."""
    return click.argument(name, type=SOURCE)


def json_option(function: F) -> F:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(
        function
    )


def debug_option(function: F) -> F:
    """Adds `--debug`, which the error handler looks for on the command line."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(
        function
    )


def selecting_options(function: F) -> F:
    """Adds the options that say which weights a quantization is for."""
    options = [
        click.option(
            "--include",
            multiple=True,
            metavar="PATTERN",
            help="Quantize these modules, too, such as '*.shared_experts.*'. May be repeated.",
        ),
        click.option(
            "--exclude",
            multiple=True,
            metavar="PATTERN",
            help="Leave these modules out, such as 'model.layers.3.*'. May be repeated, and wins.",
        ),
        click.option(
            "--mtp",
            type=click.Choice(["quantize", "keep", "drop"]),
            default="quantize",
            show_default=True,
            help="Quantize the MTP module like the rest, keep it unquantized, or leave it out.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def calibration_options(function: F) -> F:
    """Adds the options of calibrated quantization."""
    options = [
        click.option(
            "--method",
            type=click.Choice(["rtn", "rtn-weighted", "gptq"]),
            default="rtn",
            show_default=True,
            help="Round to the nearest code; or run the model to see which errors matter: choose scales by "
            "that, or make up for errors as well.",
        ),
        click.option(
            "--calibration",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Text (.txt, .jsonl) or token ids (.npy, .safetensors).  [default: a short text]",
        ),
        click.option(
            "--length", type=click.IntRange(min=2), help="Tokens of a sequence.  [default: up to 2048]"
        ),
        click.option(
            "--max-tokens", type=click.IntRange(min=4), help="Tokens of all sequences.  [default: all]"
        ),
        click.option(
            "--damping",
            type=float,
            default=0.01,
            show_default=True,
            help="Added to a Hessian's diagonal, as a part of its mean.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["F32", "BF16"]),
            help="Arithmetic of the forward pass.  [default: BF16 on GPUs, F32 on a CPU]",
        ),
        click.option(
            "--memory",
            type=SIZE,
            help="What hidden states may take in memory, else a file.  [default: a part of what is free]",
        ),
        click.option(
            "--save-every",
            type=click.IntRange(min=1),
            default=4,
            show_default=True,
            help="Layers after which an interrupted run can go on.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def shared_option(function: F) -> F:
    """Adds the option for what an MTP module repeats of the model."""
    return click.option(
        "--allow-different-shared",
        is_flag=True,
        help="Go on though embed_tokens or shared_head.head is not the model's, bit for bit.",
    )(function)


def run_options(function: F) -> F:
    """Adds the options of every command that writes a checkpoint whose shards may have any size."""
    return fixed_shards_options(
        click.option(
            "--max-shard-size",
            type=SIZE,
            help="Bytes of tensors in an output shard, such as 5GB.  [default: the source's shards]",
        )(function)
    )


def fixed_shards_options(function: F) -> F:
    """Adds the options of every command that writes a checkpoint."""
    options = [
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="auto, cpu, cuda, or cuda:0,1. The bytes are the same on all, unless calibrated.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            help="Shards worked on at once.  [default: the cores, or a few for each GPU]",
        ),
        click.option(
            "--partial",
            is_flag=True,
            help="SOURCE is only a part of the model that its config.json describes.",
        ),
        click.option(
            "--nonfinite",
            type=click.Choice(["error", "keep"]),
            default="error",
            show_default=True,
            help="Refuse NaN and infinity, or keep and count them (zeros where they become integers).",
        ),
        click.option("--overwrite", is_flag=True, help="Replace the checkpoint that is at DST."),
        click.option(
            "--keep-source",
            is_flag=True,
            help="Keep shards that come from the Hub in the Hugging Face cache.  [default: a few at a time]",
        ),
        click.option(
            "--push",
            type=TARGET,
            metavar="ORG/NAME",
            help="Upload shards to this model on the Hub as they are finished; ORG/NAME@BRANCH for a branch.",
        ),
        click.option(
            "--keep-output/--no-keep-output",
            default=True,
            help="With --push, leave the shards here, or remove each when it is uploaded.  [default: leave]",
        ),
        click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing."),
        json_option,
        debug_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def forward_options(function: F) -> F:
    """Adds the options of every command that runs a model: on which tokens, where, and how."""
    path = click.Path(dir_okay=False, path_type=Path)
    options = [
        click.option("--tokens", type=path, help="Token ids: .npy or .safetensors, [sequences, tokens]."),
        click.option(
            "--text", type=path, help="UTF-8 text, for the model's tokenizer.  [default: one comes along]"
        ),
        click.option(
            "--length", type=click.IntRange(min=2), help="Tokens of a sequence.  [default: 512, or a row]"
        ),
        click.option(
            "--max-tokens", type=click.IntRange(min=2), help="Tokens of all sequences.  [default: all]"
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="auto, cpu, cuda, or cuda:0,1; several GPUs share experts and heads.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["F32", "BF16"]),
            help="Arithmetic; weights are BF16 in both.  [default: BF16 on GPUs, F32 on a CPU]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function
