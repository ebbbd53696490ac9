"""Steps that do not add up are refused before a byte is written, all problems in one message.

Every source tensor must be the input of exactly one step or be dropped with a reason, every output name be
unique, and every input have the spec that its format demands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.plan import SOURCE, Share, Step, TensorRef
from dsv3_tools.errors import FormatError, PlanError

__all__ = ["check_steps"]


def check_steps(
    where: str,
    specs: Mapping[str, Mapping[str, TensorSpec]],
    steps: Sequence[Step],
    *,
    dropped: Mapping[str, str],
    refused: Mapping[str, str],
    others: Sequence[str] = (),
    origins: Sequence[str] = (SOURCE,),
) -> None:
    """Refuses steps that do not account for every source tensor exactly once, or ask for the impossible.

    Args:
        where: the checkpoint, for the message.
        specs: the tensors of every origin.
        steps: the steps of the plan.
        dropped: source tensors that are left out on purpose, with the reason.
        refused: source tensors that the planner could not place, with what is wrong with them.
        others: problems that are already known.
        origins: those whose tensors must all be accounted for.

    Raises:
        PlanError: with every problem found.
    """
    problems = [*others, *(f"{name} {reason}" for name, reason in refused.items())]
    shares: dict[TensorRef, list[Share | None]] = {TensorRef(name): [None] for name in dropped}
    for step in steps:
        for ref in () if step.is_repetition else step.inputs.values():
            shares.setdefault(ref, []).append(step.share)
    for name in dropped:
        shares[TensorRef(name)] = [None] * len(shares[TensorRef(name)])
    for ref, found in shares.items():
        if ref.name not in specs[ref.origin]:
            problems.append(f"{ref.name} is missing")
        elif not _add_up(found):
            problems.append(f"{ref.name} would be used {len(found)} times")
    problems += [
        f"{name} is used by no step"
        for origin in origins
        for name in specs[origin]
        if TensorRef(name, origin) not in shares and name not in refused
    ]
    outputs = Counter(
        (name, step.share and step.share.rank) for step in steps for name in step.outputs.values()
    )
    problems += [f"{name} would be written {n} times" for (name, _), n in outputs.items() if n > 1]
    for step in steps:
        problems += _spec_problems(step, specs)
    if problems:
        raise PlanError(where, problems)


def _add_up(shares: Sequence[Share | None]) -> bool:
    """Whether a tensor is used once, or once by each rank in the same way."""
    first = shares[0]
    if first is None:
        return len(shares) == 1
    expected = {Share(rank, first.world, first.axis) for rank in range(first.world)}
    return len(shares) == first.world and set(shares) == expected


def _spec_problems(step: Step, specs: Mapping[str, Mapping[str, TensorSpec]]) -> Iterator[str]:
    try:
        expected = step.input_specs(step.shape)
        step.output_specs(step.shape)
    except FormatError as error:
        yield f"{step.weight.name}: {error}"
        return
    for part, spec in expected.items():
        ref = step.inputs[part]
        whole = spec if step.share is None else TensorSpec(spec.dtype, step.share.whole(spec.shape))
        found = specs[ref.origin].get(ref.name)
        if found is not None and found != whole:
            weight = TensorSpec(step.dtype, step.shape)
            yield f"{ref.name} is {found}, expected {whole} for a weight {weight}"
