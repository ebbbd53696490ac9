"""Which engines will load what a plan makes, asked before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dsv3_tools.conversion.plan import Plan
from dsv3_tools.engines import ModelView, Verdict, verdicts

__all__ = ["engine_verdicts"]


def engine_verdicts(plan: Plan) -> Mapping[str, Verdict]:
    """Returns, by engine, whether it would load the plan's result, and what it would stumble over.

    Empty for a plan without an index: no engine opens what is not a Hugging Face checkpoint.
    """
    if plan.index_name is None:
        return {}
    specs = {name: spec for shard in plan.shards for name, spec in shard.specs().items()}
    weight_map = {name: shard.name for shard in plan.shards for name in shard.specs()}
    return verdicts(ModelView(specs, json.loads(plan.config), weight_map))
