"""Shows a plan, carries it out, and says what was done: the same for every command that writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.cli.calibration import print_forecast, print_report, warn_of_few_tokens
from dsv3_tools.cli.output import as_json as jsonable
from dsv3_tools.cli.output import print_json, print_line, print_note, print_table, size
from dsv3_tools.cli.progress import shown_progress
from dsv3_tools.cli.signals import stop_on_signals
from dsv3_tools.conversion.card import card_problem
from dsv3_tools.conversion.executor import RunResult, run
from dsv3_tools.conversion.hub_target import PushTarget
from dsv3_tools.conversion.making import Maker
from dsv3_tools.conversion.options import HubOptions, RunOptions
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.preview import Preview
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.conversion.serving import engine_verdicts
from dsv3_tools.conversion.together import Part, preview_together
from dsv3_tools.errors import DestinationError
from dsv3_tools.quantize.report import overview, read_report

__all__ = ["execute", "execute_together"]


def execute(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    destination: Path,
    *,
    as_json: bool,
    maker: Maker | None = None,
    **how: Any,
) -> None:
    """Carries out `plan`, or only shows it."""
    said = _carry_out([Part(plan, destination, maker)], checkpoints, as_json=as_json, **how)
    if as_json and said:
        print_json(said[0])


def execute_together(
    parts: Mapping[str, Part], checkpoints: Mapping[str, Checkpoint], *, as_json: bool, **how: Any
) -> None:
    """Carries out the plans of a command with several results, one after the other, or only shows them."""
    said = _carry_out(list(parts.values()), checkpoints, as_json=as_json, **how)
    if as_json and said:
        print_json(dict(zip(parts, said, strict=True)))


def _carry_out(
    parts: Sequence[Part],
    checkpoints: Mapping[str, Checkpoint],
    *,
    device: str,
    workers: int | None,
    nonfinite: str,
    overwrite: bool,
    keep_source: bool,
    push: PushTarget | None,
    keep_output: bool,
    dry_run: bool,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Carries out all plans, or none if one would be refused; returns what `--json` says of each."""
    ranks = Ranks.join()
    hub = HubOptions(keep_source, push, keep_output)
    options = RunOptions(device, workers, overwrite, nonfinite, ranks=ranks, hub=hub)
    found = preview_together(parts, checkpoints, options)
    problem = next((one.problem for one in found if one.problem is not None), None)
    if problem is not None and not (dry_run and not as_json and isinstance(problem, DestinationError)):
        raise problem
    source = checkpoints["source"]
    if ranks.is_first and not as_json:
        for part, one in zip(parts, found, strict=True):
            _print_plan(part.plan, " + ".join(str(c.source) for c in checkpoints.values()), part.destination)
            if dry_run:
                if part.maker is not None:
                    print_forecast(part.maker.forecast(one.devices[0], ranks.world_size))
                _print_preview(part.plan, one, options.hub)
    if dry_run:
        if problem is not None:
            raise problem
        return [_plan_json(part, source, one, ranks) for part, one in zip(parts, found, strict=True)]
    said = []
    with stop_on_signals() as stop:
        for part in parts:
            pieces = "shards" if part.maker is None else "layers"
            with shown_progress(part.plan.operation, pieces=pieces, quiet=not ranks.is_first) as update:
                how = replace(options, on_progress=update, stop=stop)
                result = run(part.plan, checkpoints, part.destination, how, part.maker)
            if ranks.is_first:
                report = {} if part.maker is None else read_report(part.destination)
                said.append(_result_json(part.plan, result, report))
                if not as_json:
                    _print_result(result)
                    print_report(report)
                    warn_of_few_tokens(report)
    return said


def _result_json(plan: Plan, result: RunResult, report: Mapping[str, Any]) -> dict[str, Any]:
    engines = {name: verdict.loads for name, verdict in engine_verdicts(plan).items()}
    found: dict[str, Any] = jsonable(result)
    more = {"calibration": jsonable(overview(report))} if report else {}
    return found | {"manifest": str(result.manifest), "engines": engines, **more}


def _plan_json(part: Part, source: Checkpoint, found: Preview, ranks: Ranks) -> dict[str, Any]:
    plan, maker = part.plan, part.maker
    forecast = None if maker is None else dict(maker.forecast(found.devices[0], ranks.world_size))
    return {
        "operation": plan.operation,
        "options": dict(plan.options),
        "source": str(source.source),
        "destination": str(part.destination),
        "nbytes_in": plan.nbytes_in,
        "nbytes_out": plan.nbytes_out,
        "payload_nbytes_out": plan.payload_nbytes,
        "tensors_in": plan.num_tensors_in,
        "tensors_out": plan.num_tensors_out,
        "parameters": plan.total_parameters,
        "shards": [{"name": shard.name, "nbytes": shard.nbytes} for shard in plan.shards],
        "changes": jsonable(plan.changes()),
        "dropped": dict(plan.dropped),
        "copied_files": list(plan.side_files),
        "left_behind": list(plan.left_behind),
        "state": found.state.name.lower(),
        "shards_to_write": found.shards_to_write,
        "nbytes_to_write": found.nbytes_to_write,
        "nbytes_free": found.nbytes_free,
        "nbytes_to_fetch": found.nbytes_to_fetch,
        "nbytes_staged": found.nbytes_staged,
        "devices": list(found.devices),
        "workers": found.workers,
        "host_nbytes": found.host_nbytes,
        "engines": jsonable(engine_verdicts(plan)),
        "notes": list(plan.notes),
        **({} if forecast is None else {"calibration": forecast}),
    }


def _print_plan(plan: Plan, sources: str, destination: Path) -> None:
    print_line(f"{plan.operation}: {sources} -> {destination}")
    print_table(
        [
            (
                f"{change.count:,}",
                f"{change.before} -> {change.after}"
                if change.after != "copied"
                else f"{change.before} copied",
                size(change.nbytes_before),
                "->",
                size(change.nbytes_after),
            )
            for change in plan.changes()
        ]
    )
    for reason in dict.fromkeys(plan.dropped.values()):
        names = [name for name, why in plan.dropped.items() if why == reason]
        print_line(f"  dropped: {len(names):,} tensors, {reason}: {list_names(names)}")
    print_line(
        f"  in: {plan.num_tensors_in:,} tensors, {plan.nbytes_in:,} bytes; "
        f"out: {plan.num_tensors_out:,} tensors, {plan.payload_nbytes:,} bytes in {len(plan.shards)} shards"
    )
    print_line(f"  files copied: {', '.join(plan.side_files) or 'none'}")
    if plan.left_behind:
        print_line(f"  files left behind: {', '.join(plan.left_behind)}")
    _print_engines(plan)
    for note in plan.notes:
        print_line(f"  note: {note}")


def _print_engines(plan: Plan) -> None:
    """Says who will load the result, with what each of them asks for."""
    found = engine_verdicts(plan)
    if not found:
        return
    loading = [name for name, verdict in found.items() if verdict.loads]
    others = [name for name in found if name not in loading]
    print_line(f"  engines that load it: {', '.join(loading) or 'none'}; not: {', '.join(others) or 'none'}")
    # Where nobody loads it, what those say for whom most results are made.
    for name in loading or ("vllm", "sglang", "transformers"):
        for problem in found[name].problems:
            print_line(f"    {name}: {problem.message}")


def _print_preview(plan: Plan, found: Preview, hub: HubOptions) -> None:
    print_line(
        f"  to write: {found.shards_to_write} of {len(plan.shards)} shards, {size(found.nbytes_to_write)}; "
        f"free: {size(found.nbytes_free)}; state of the destination: {found.state.value}"
    )
    print_line(
        f"  {found.workers} workers on {', '.join(found.devices)}, "
        f"at most {size(found.host_nbytes)} of buffers"
    )
    if found.nbytes_to_fetch:
        beside = f", at most {size(found.nbytes_staged)} of it on disk at once" if found.nbytes_staged else ""
        print_line(f"  to fetch from the Hub: {size(found.nbytes_to_fetch)}{beside}")
    if hub.push is not None:
        kept = "and kept here" if hub.keep_output else "and removed here, shard by shard"
        print_line(f"  to be uploaded to {hub.push.repo}, {kept}")
    print_line("  nothing was written (--dry-run)")


def _print_result(result: RunResult) -> None:
    if result.already_complete:
        to_check = f" To check its bytes: dsv3 verify integrity {result.destination}"
        print_line(
            f"already complete: {result.destination} holds this result by its manifest and sizes; nothing "
            f"was written.{to_check if result.shards_are_here else ''}"
        )
        _print_nonfinite(result)
        _print_pushed(result)
        return
    kept = f", {result.shards_resumed} were there already" if result.shards_resumed else ""
    print_line(
        f"wrote {result.shards_written} shards{kept}; {size(result.nbytes_out)} in all, "
        f"{result.seconds:.1f} s with {result.workers} workers on {', '.join(result.devices)}"
    )
    if result.blocks_compared:
        print_line(
            f"{result.blocks_kept:,} of {result.blocks_compared:,} blocks have the scale of the original; "
            "those that did not change have its bytes"
        )
    _print_nonfinite(result)
    _print_pushed(result)
    if problem := card_problem(result.destination):
        print_note(f"dsv3: left alone, so that the result has no model card: {problem}")
    if result.shards_are_here:
        check = f"; to check: dsv3 verify integrity {result.destination}"
        print_line(f"every file's SHA-256 is in {result.manifest}{check}")


def _print_pushed(result: RunResult) -> None:
    if result.pushed is not None:
        print_line(f"uploaded: {result.pushed}")


def _print_nonfinite(result: RunResult) -> None:
    if result.nonfinite:
        total = sum(result.nonfinite.values())
        integers = result.operation.startswith("quantize")
        print_note(
            f"dsv3: {total:,} NaN or infinite elements in {len(result.nonfinite)} tensors were "
            f"{'written as zeros where they became integers' if integers else 'kept'}, listed in the manifest"
        )
