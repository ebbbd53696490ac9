"""Which step goes into which output shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsv3_tools.checkpoint.index import shard_name
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.conversion.plan import ShardPlan, Step
from dsv3_tools.errors import UsageError

__all__ = ["Location", "by_layer", "lay_out"]

Location = tuple[str, int]
"""A shard, and where in it."""


def by_layer(steps: Sequence[Step], max_shard_size: int) -> Callable[[Step], Location]:
    """Returns locations that give every layer shards of its own, of so many bytes of tensors at most.

    The embedding comes first; what else belongs to no layer comes last.
    """
    places: dict[str, Location] = {}
    filled: dict[int, tuple[int, int]] = {}  # of each layer: its last shard's number, and bytes in it
    for number, step in enumerate(steps):
        layer = _layer_order(step)
        shard, nbytes = filled.get(layer, (0, 0))
        own = sum(spec.nbytes for _, spec in step.named_outputs())
        if nbytes and nbytes + own > max_shard_size:
            shard, nbytes = shard + 1, 0
        filled[layer] = shard, nbytes + own
        places[step.weight.name] = f"{layer:06d}-{shard:06d}", number
    return lambda step: places[step.weight.name]


def _layer_order(step: Step) -> int:
    parsed = parse_name(step.weight.name)
    if parsed is None or parsed.layer is None:
        return 0 if "embed_tokens" in step.weight.name else 999_999
    return parsed.layer + 1


def lay_out(
    steps: Sequence[Step],
    location: Callable[[Step], Location],
    max_shard_size: int | None,
    *,
    keep_names: bool = False,
) -> tuple[ShardPlan, ...]:
    """Returns the output shards.

    Without `max_shard_size` every step stays in the shard of its weight, and a source shard that
    holds nothing but scales has no counterpart. With it, shards are filled in the source's order up
    to so many bytes of tensors; a weight larger than that gets a shard of its own. The parts of one
    step always share a shard: some engines join a weight's only then.

    Args:
        steps: of the plan.
        location: where each step's weight is.
        max_shard_size: bytes of tensors in a shard.
        keep_names: shards have the names in `location`, instead of being numbered anew.

    Raises:
        UsageError: `max_shard_size` is not positive.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"max_shard_size: got {max_shard_size}, expected a positive number of bytes")
    in_order = sorted(((location(step), step) for step in steps), key=lambda pair: pair[0])
    groups: list[list[Step]] = []
    names: list[str] = []
    last_shard, filled = None, 0
    for (shard, _), step in in_order:
        nbytes = sum(spec.nbytes for _, spec in step.named_outputs())
        full = shard != last_shard if max_shard_size is None else filled + nbytes > max_shard_size
        if full or not groups:
            groups.append([])
            names.append(shard)
            filled = 0
        groups[-1].append(step)
        last_shard, filled = shard, filled + nbytes
    return tuple(
        ShardPlan.build(name if keep_names else shard_name(number, len(groups)), group)
        for number, (name, group) in enumerate(zip(names, groups, strict=True), start=1)
    )
