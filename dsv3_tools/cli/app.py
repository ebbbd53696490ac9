"""The command tree, and the one place where exceptions become exit codes.

Commands are imported when they are called: `dsv3 --help` must not wait for torch.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click
import rich_click

from dsv3_tools import __version__
from dsv3_tools.cli.output import print_error
from dsv3_tools.errors import Dsv3Error

__all__ = ["convert", "dsv3", "quantize", "run_command_line", "verify"]

_UNEXPECTED = 1
_USAGE = 2


class _Deferred(click.Command):
    """A command whose module is imported when it is called, not when its group's help is shown."""

    def __init__(self, name: str, home: str, line: str) -> None:
        super().__init__(name, short_help=line)
        self._home = home

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Returns the real command's context, with which click goes on."""
        return self.load().make_context(info_name, args, parent, **extra)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Returns the real command's parameters, for shell completion."""
        return self.load().get_params(ctx)

    def load(self) -> click.Command:
        """Returns the real command: an attribute, named after it, of its home module."""
        assert self.name is not None
        command: click.Command = getattr(import_module(self._home), self.name.replace("-", "_"))
        return command


@rich_click.group(context_settings={"help_option_names": ["-h", "--help"]})
@rich_click.version_option(__version__, prog_name="dsv3")
def dsv3() -> None:
    """Rewrite DeepSeek-V3-family checkpoints, and prove that the result is right.

    \b
    Start here:
      dsv3 inspect SRC
      dsv3 convert fp8-to-bf16 SRC DST --dry-run
      dsv3 convert fp8-to-bf16 SRC DST

    SRC is a directory or a model on the Hugging Face Hub: org/name, org/name@revision, hf://org/name. Of that
    only headers come here until a run needs more, then a few shards at a time.

    A run that was interrupted goes on when the same command is run again.

    \b
    Exit codes: 0 done, 1 unexpected error, 2 usage, 3 bad input checkpoint,
    4 a check ran and the answer is no, 5 destination, 7 network (a retry may help), 128 + signal.
    """


@dsv3.group()
def convert() -> None:
    """Rewrite a checkpoint in another weight layout: streaming, resumable, the same bytes everywhere."""


@dsv3.group()
def quantize() -> None:
    """Quantize a checkpoint to integers: straight from FP8 or BF16, in the layouts that engines load."""


@dsv3.group()
def verify() -> None:
    """Prove that a checkpoint is what it should be. Exit code 4 means that it is not."""


convert.add_command(_Deferred("fp8-to-bf16", "dsv3_tools.cli.convert", "FP8 blocks, as released, to BF16."))
convert.add_command(_Deferred("bf16-to-fp8", "dsv3_tools.cli.convert", "BF16 to FP8 blocks, as released."))
convert.add_command(_Deferred("int8-to-bf16", "dsv3_tools.cli.convert", "INT8 blocks or channels to BF16."))
convert.add_command(
    _Deferred("int4-to-bf16", "dsv3_tools.cli.convert", "INT4 (compressed-tensors, GPTQ, AWQ) to BF16.")
)
convert.add_command(
    _Deferred("to-deepseek-infer", "dsv3_tools.cli.convert", "FP8 or BF16 to DeepSeek's inference demo.")
)
quantize.add_command(_Deferred("int8", "dsv3_tools.cli.quantize", "Every linear, by rows or by blocks."))
quantize.add_command(_Deferred("int4", "dsv3_tools.cli.quantize", "Routed experts, in groups of a row."))
verify.add_command(
    _Deferred("logits", "dsv3_tools.cli.verify_logits", "What two checkpoints predict, layer by layer.")
)
verify.add_command(
    _Deferred("mtp", "dsv3_tools.cli.verify_mtp", "How often the MTP module's drafts are accepted.")
)
verify.add_command(_Deferred("integrity", "dsv3_tools.cli.verify", "Hashes and structure of every file."))
verify.add_command(_Deferred("structure", "dsv3_tools.cli.verify", "Complete, and sound in itself."))
verify.add_command(_Deferred("tensors", "dsv3_tools.cli.verify", "Every tensor against another checkpoint."))
dsv3.add_command(
    _Deferred("inspect", "dsv3_tools.cli.inspect", "Say what a checkpoint is, from its headers.")
)
dsv3.add_command(_Deferred("check", "dsv3_tools.cli.check", "Say whether a serving engine would load it."))
dsv3.add_command(_Deferred("card", "dsv3_tools.cli.card", "Write the model card of a result again."))
dsv3.add_command(
    _Deferred("split-mtp", "dsv3_tools.cli.mtp", "Take the MTP module out: the model, the module, or both.")
)
dsv3.add_command(_Deferred("merge-mtp", "dsv3_tools.cli.mtp", "Put an MTP module back beside a model."))
dsv3.add_command(_Deferred("push", "dsv3_tools.cli.push", "Upload a finished checkpoint to the Hub."))
dsv3.add_command(_Deferred("sample", "dsv3_tools.cli.sample", "Make a checkpoint with random weights."))


def run_command_line(arguments: Sequence[str]) -> int:
    """Runs one command; returns its exit code and prints whatever went wrong as one line."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as stop:
        # Shell completion exits by itself; click makes an exit of a broken pipe, too.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, BrokenPipeError):
            return stop.code if isinstance(stop.code, int) else _UNEXPECTED
        # The reader of our output has gone; python would complain once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _run(arguments: Sequence[str]) -> int:
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        code = dsv3.main(list(arguments), prog_name="dsv3", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        print_error("interrupted", 128 + signal.SIGINT, as_json=as_json)
        return 128 + signal.SIGINT
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return _USAGE
    except click.ClickException as error:
        message = " ".join(error.format_message().split())  # click puts choices on lines of their own
        return _report(message, _USAGE, as_json=as_json, hint=_hint(error))
    except Dsv3Error as error:
        if debug:
            traceback.print_exc()
        return _report(str(error), error.exit_code, as_json=as_json, kind=type(error).__name__)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(_unexpected(error), _UNEXPECTED, as_json=as_json, kind=type(error).__name__)
    return code if isinstance(code, int) else 0


def _report(message: str, code: int, *, as_json: bool, kind: str = "UsageError", hint: str = "") -> int:
    print_error(message + hint, code, as_json=as_json, kind=kind)
    return code


def _hint(error: click.ClickException) -> str:
    ctx: Any = getattr(error, "ctx", None)
    return f" (see {ctx.command_path} --help)" if ctx is not None else ""


def _unexpected(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "too many open files; raise the limit with ulimit -n"
    if isinstance(error, MemoryError):
        return "out of memory; use fewer --workers"
    return (
        f"unexpected {type(error).__name__}: {error}; run with --debug for the traceback, and please "
        "report it"
    )
