"""Which engines will load what a plan makes, asked before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dsv3_tools.conversion.plan import Plan
from dsv3_tools.engines import ModelView, Verdict, verdicts

__all__ = ["engine_verdicts", "planned_view"]


def engine_verdicts(plan: Plan) -> Mapping[str, Verdict]:
    """Returns, by engine, whether it would load the plan's result, and what it would stumble over.

    Empty for a plan without an index: no engine opens what is not a Hugging Face checkpoint.
    """
    view = planned_view(plan)
    return {} if view is None else verdicts(view)


def planned_view(plan: Plan) -> ModelView | None:
    """Returns a plan's result as the rules about engines see it; None if there is no index."""
    if plan.index_name is None:
        return None
    specs = {name: spec for shard in plan.shards for name, spec in shard.specs().items()}
    weight_map = {name: shard.name for shard in plan.shards for name in shard.specs()}
    return ModelView(specs, json.loads(plan.config), weight_map)
