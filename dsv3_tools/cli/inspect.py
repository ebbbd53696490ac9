"""`dsv3 inspect`."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from dsv3_tools.checkpoint.source import Source
from dsv3_tools.cli.calibration import print_report
from dsv3_tools.cli.options import debug_option, json_option, source_argument
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line, print_table, size
from dsv3_tools.quantize.report import overview, read_report
from dsv3_tools.verify.inspection import Inspection
from dsv3_tools.verify.inspection import inspect as inspect_checkpoint

__all__ = ["inspect"]


@click.command("inspect")
@source_argument("directory")
@json_option
@debug_option
def inspect(directory: Source, *, as_json: bool) -> None:
    """Say what a checkpoint is, from config.json, index and headers; no weight is read.

    \b
    Example:
      dsv3 inspect miniature/checkpoint
    """
    found = inspect_checkpoint(directory)
    report = read_report(directory) if isinstance(directory, Path) else {}
    if as_json:
        print_json({**jsonable(found), "calibration": jsonable(overview(report)) if report else None})
    else:
        _print(found)
        print_report(report)


def _print(found: Inspection) -> None:
    config, parameters = found.config, found.parameters
    depth = len(config.main_layers)
    layers = f"{depth} layers ({min(config.first_k_dense_replace, depth)} dense), " if depth else ""
    print_line(f"{found.directory}: {found.model_type}, {layers}hidden size {config.hidden_size:,}")
    print_line(
        f"  experts: {config.n_routed_experts} routed, {config.num_experts_per_tok} per token, "
        f"{config.n_shared_experts} shared"
    )
    if found.mtp is None or not found.mtp.alone:
        print_line(
            f"  parameters: {parameters.total:,} ({parameters.active:,} active per token, "
            f"{parameters.routed:,} in routed experts)"
        )
    _print_module(found)
    print_line(f"  quantization: {_quantization(found)}")
    for name, weights in found.formats.items():
        print_line(
            f"    {name}: {weights.num_weights:,} weights, {weights.num_parameters:,} parameters in "
            f"{weights.nbytes:,} bytes"
        )
    print_line(
        f"  {found.num_tensors:,} tensors, {found.nbytes:,} bytes in {found.num_shards} shards "
        f"({found.nbytes_on_disk:,} bytes on disk)"
    )
    print_table(
        [
            (dtype, f"{count.num_tensors:,} tensors", f"{count.nbytes:,} bytes")
            for dtype, count in found.dtypes.items()
        ],
        indent="    ",
    )
    if found.written_by_dsv3:
        print_line(f"  has a manifest; to check its hashes: dsv3 verify integrity {found.directory}")
    for line in found.odd:
        print_line(f"  odd: {line}")


def _print_module(found: Inspection) -> None:
    module, counted = found.mtp, found.config.mtp_layers
    if module is None:
        print_line(
            f"  MTP module: none{f', but config.json counts {len(counted)} layers' if counted else ''}"
        )
        return
    layers = ", ".join(map(str, module.layers))
    print_line(
        f"  MTP module: layer {layers}, {module.num_tensors:,} tensors, "
        f"{module.num_parameters:,} parameters, {size(module.nbytes)}"
    )
    formats = ", ".join(f"{count.num_weights:,} {name}" for name, count in module.formats.items())
    shared = "without embedding and head"
    if module.shared:
        shared = f"with its own {' and '.join(module.shared)}"
    agreement = "agrees" if module.agrees else f"counts {len(counted)} layers"
    print_line(f"    weights: {formats}; {shared}; config.json {agreement}")
    if module.alone:
        readers = "SGLang, LightLLM" if module.layout == "sglang-nextn" else "vLLM, LMDeploy"
        print_line(f"    there is no model beside it: a draft in the layout {module.layout} ({readers})")


def _quantization(found: Inspection) -> str:
    if found.quantization is None:
        return "none"
    shown = [f"{key} {_value(value)}" for key, value in found.quantization.items() if value is not None]
    return ", ".join(text for text in shown if not text.endswith(" "))


def _value(value: object) -> str:
    """Returns a setting in a few words: lists of names as their length, tables not at all."""
    if isinstance(value, list) and any(isinstance(entry, str) for entry in value):
        return f"({len(value)} entries)"
    return "" if isinstance(value, dict) else str(value)
