"""Which step goes into which output shard."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_tools.checkpoint.index import shard_name
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.plan import ShardPlan, Step
from dsv3_tools.errors import UsageError

__all__ = ["lay_out"]


def lay_out(
    checkpoint: Checkpoint, steps: Sequence[Step], max_shard_size: int | None
) -> tuple[ShardPlan, ...]:
    """Returns the output shards.

    Without `max_shard_size` every step stays in the shard of its weight, and a source shard that
    holds nothing but scales has no counterpart. With it, shards are filled in the source's order up
    to so many bytes of tensors; a weight larger than that gets a shard of its own. The parts of one
    weight always share a shard: some engines join them only then.

    Raises:
        UsageError: `max_shard_size` is not positive.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"max_shard_size: got {max_shard_size}, expected a positive number of bytes")
    in_order = sorted(steps, key=lambda step: checkpoint.location(step.weight.name))
    groups: list[list[Step]] = []
    last_shard, filled = None, 0
    for step in in_order:
        shard = checkpoint.weight_map[step.weight.name]
        nbytes = sum(spec.nbytes for _, spec in step.named_outputs())
        full = shard != last_shard if max_shard_size is None else filled + nbytes > max_shard_size
        if full or not groups:
            groups.append([])
            filled = 0
        groups[-1].append(step)
        last_shard, filled = shard, filled + nbytes
    return tuple(
        ShardPlan.build(shard_name(number, len(groups)), group)
        for number, group in enumerate(groups, start=1)
    )
