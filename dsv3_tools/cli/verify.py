"""`dsv3 verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from dsv3_tools.checkpoint.source import Source
from dsv3_tools.cli.findings import finish, print_findings, verdict
from dsv3_tools.cli.options import debug_option, json_option, source_argument
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line, print_table, size
from dsv3_tools.cli.progress import shown_progress
from dsv3_tools.cli.signals import stop_on_signals
from dsv3_tools.verify.integrity import verify_integrity
from dsv3_tools.verify.results import FormatResult, TensorResult
from dsv3_tools.verify.structure import verify_structure
from dsv3_tools.verify.tensors import TensorReport, verify_tensors

__all__ = ["integrity", "structure", "tensors"]


@click.command("integrity")
@source_argument("directory")
@click.option("--workers", type=click.IntRange(min=1), help="Files hashed at once.  [default: the cores]")
@json_option
@debug_option
@click.pass_context
def integrity(ctx: click.Context, directory: Path, *, workers: int | None, as_json: bool) -> None:
    """Compare every file with the manifest's SHA-256, and the index with the shards' headers.

    In a Hugging Face cache, whose files are named by their SHA-256, these are compared instead. Without
    either, index and headers are checked and nothing can be said of the data.

    \b
    Example:
      dsv3 verify integrity /tmp/mini-bf16
    """
    with stop_on_signals(resumes=False) as stop, shown_progress("verify integrity") as update:
        report = verify_integrity(directory, workers=workers, on_progress=update, stop=stop)
    if as_json:
        print_json(jsonable(report) | {"passed": report.passed})
    else:
        for problem in report.problems:
            print_line(f"  {problem}")
        answer = verdict(report.problems)
        checked = (
            f"{report.files_hashed} files, {size(report.nbytes_hashed)}, against the {report.hashes_from}"
        )
        if report.hashes_from is None:
            answer = "structure ok, data not checked" if report.passed else answer
            checked = "index against headers; there is no manifest to compare the data with"
        print_line(f"{answer}: {directory}: {checked}")
    finish(ctx, str(directory), report.problems, as_json=as_json)


@click.command("structure")
@source_argument("directory")
@click.option(
    "--data/--no-data",
    default=True,
    show_default=True,
    help="Read the tensors, too, or headers alone.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Tensors read at once.  [default: the cores]")
@json_option
@debug_option
@click.pass_context
def structure(ctx: click.Context, directory: Path, *, data: bool, workers: int | None, as_json: bool) -> None:
    """Check that a checkpoint is complete and sound in itself; there is nothing to compare it with.

    Headers, index and config.json agree, every tensor of the model is there in its shape, every quantized
    weight has its parts, and the MTP module is what num_nextn_predict_layers says. In the data: no NaN and
    no infinity, and scales that can be scales.

    \b
    Example:
      dsv3 verify structure /tmp/mini-W4A16
      dsv3 verify structure miniature/checkpoint --no-data
    """
    with stop_on_signals(resumes=False) as stop, shown_progress("verify structure") as update:
        report = verify_structure(directory, data=data, workers=workers, on_progress=update, stop=stop)
    if as_json:
        print_json(jsonable(report) | {"passed": report.passed})
    else:
        read = f"{size(report.nbytes)} read" if data else "headers alone"
        print_line(f"{verdict(report.problems)}: {directory}: {report.num_tensors:,} tensors, {read}")
        print_findings(report.problems, report.notes)
    finish(ctx, str(directory), report.problems, as_json=as_json)


class _Sample(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        try:
            found = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            found = 0.0
        if not (0 < found < 1 or (found >= 1 and found == int(found) and not text.endswith("%"))):
            self.fail(
                f"{text!r} is neither a number of weights, such as 100, nor a share, such as 5%", param, ctx
            )
        return found


@click.command("tensors")
@source_argument("reference")
@source_argument("candidate")
@click.option(
    "--sample", type=_Sample(), help="Compare so many weights, or a share such as 5%.  [default: all]"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sample.")
@click.option(
    "--min-snr",
    type=float,
    help="Least signal to error of quantized weights in dB, for calibrated codes.  [default: by format]",
)
@click.option("--exact", is_flag=True, help="Allow no error but that of rounding to BF16.")
@click.option("--workers", type=click.IntRange(min=1), help="Weights compared at once.  [default: the cores]")
@click.option("--device", default="cpu", show_default=True, help="Where weights are compared: cpu.")
@json_option
@debug_option
@click.pass_context
def tensors(
    ctx: click.Context, /, reference: Source, candidate: Source, *, as_json: bool, **options: Any
) -> None:
    """Compare every tensor of CANDIDATE with REFERENCE, whatever formats they are in.

    Nothing may be missing or left over. What is not quantized must be the same bits; BF16 from FP8 must be
    the product, rounded once; INT8 and INT4 codes must be the nearest to the reference and reach the ratio
    of signal to error that their format reaches. One wrong byte is found, and named with its place.

    \b
    Example:
      dsv3 verify tensors miniature/checkpoint /tmp/mini-bf16
      dsv3 verify tensors /tmp/mini-bf16 /tmp/mini-W4A16 --sample 10%
    """
    with stop_on_signals(resumes=False) as stop, shown_progress("verify tensors") as update:
        report = verify_tensors(reference, candidate, on_progress=update, stop=stop, **options)
    if as_json:
        document = {key: value for key, value in jsonable(report).items() if key != "weights"}
        print_json(document | {"passed": report.passed})
    else:
        _print_tensors(report)
    finish(ctx, str(candidate), report.problems, as_json=as_json)


def _print_tensors(report: TensorReport) -> None:
    compared = f"{report.num_compared:,} parameters, {size(report.nbytes)}"
    if report.sample is not None:
        compared = f"a sample, {report.sample}, {size(report.nbytes)}"
    print_line(f"{verdict(report.problems)}: {report.candidate} against {report.reference}: {compared}")
    heads = ("reference", "candidate", "weights", "equal", "least SNR", "median SNR", "failed")
    print_table([heads, *map(_row, report.formats)])
    if report.worst:
        print_line("  worst:")
        print_table([_worst_row(result) for result in report.worst], indent="    ")
    print_findings(report.problems, report.notes)


def _row(found: FormatResult) -> tuple[str, ...]:
    return (
        found.reference,
        found.candidate,
        f"{found.num_weights:,}",
        _share(found.exact),
        _decibels(found.least_snr),
        _decibels(found.median_snr),
        f"{found.failed:,}",
    )


def _worst_row(result: TensorResult) -> tuple[str, ...]:
    place = "" if result.worst_block is None else f"block at {list(result.worst_block)}"
    steps = "" if result.max_steps is None else f"{result.max_steps:.3f} steps"
    share = f"{_share(result.exact)} equal"
    return result.name, "FAILED" if result.problem else "ok", _decibels(result.snr), steps, share, place


def _share(share: float) -> str:
    """Returns a share; 100 % only if nothing is missing from it."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9999):.4f} %"


def _decibels(snr: float | None) -> str:
    return "no error" if snr is None else f"{snr:.1f} dB"
