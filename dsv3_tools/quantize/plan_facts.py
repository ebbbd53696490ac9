"""What a calibrated plan says of layers: their steps and shards, and the shapes of what is quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.conversion.plan import Plan, ShardPlan, Step
from dsv3_tools.conversion.quantization import is_made
from dsv3_tools.quantize.forecast import Matrices

__all__ = ["made_steps", "matrices", "shards_of_layers"]


def made_steps(plan: Plan) -> dict[int, dict[str, Step]]:
    """Returns the steps whose codes are made, by layer and by the weight's name."""
    found: dict[int, dict[str, Step]] = {}
    for shard in plan.shards:
        for step in filter(is_made, shard.steps):
            layer, name = _weight_of(step)
            found.setdefault(layer, {})[name] = step
    return dict(sorted(found.items()))


def shards_of_layers(plan: Plan) -> dict[int, list[ShardPlan]]:
    """Returns the shards with weights that are made, by layer; each is of one layer alone."""
    found: dict[int, list[ShardPlan]] = {}
    for shard in plan.shards:
        step = next(filter(is_made, shard.steps), None)
        if step is not None:
            found.setdefault(_weight_of(step)[0], []).append(shard)
    return found


def matrices(layers: Mapping[int, Mapping[str, Step]]) -> list[Matrices]:
    """Returns what is quantized, by shape; gate and up are one."""
    counts: Counter[tuple[int, int, bool]] = Counter()
    for steps in layers.values():
        for name, step in steps.items():
            rows, columns = step.shape
            if not name.endswith(".up_proj.weight"):
                rows *= 2 if name.endswith(".gate_proj.weight") else 1
                counts[rows, columns, ".mlp.experts." in name] += 1
    return [Matrices(rows, columns, count, is_expert) for (rows, columns, is_expert), count in counts.items()]


def _weight_of(step: Step) -> tuple[int, str]:
    """Returns a step's layer, and the name of its weight in an unquantized checkpoint."""
    parsed = parse_name(step.weight.name)
    assert parsed is not None and parsed.layer is not None
    return parsed.layer, f"{parsed.prefix}.weight"
