"""An MTP module in a checkpoint of its own: under the names of the whole model, or exported as layer 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dsv3_tools.checkpoint.config import CONFIG_NAME, ModelConfig
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.errors import CheckpointError

__all__ = ["Module", "find_module"]

_SHARED = (
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
"""Dimensions of a module that are those of its main model."""


class Module(NamedTuple):
    """A module's checkpoint; `layers` are the numbers in the whole model, by those that it has there."""

    checkpoint: Checkpoint
    layers: Mapping[int, int]

    def full_name(self, stored: str) -> str | None:
        """Returns the name in the whole model of one of the module's weights; None if it is not one."""
        parsed = parse_name(stored)
        if parsed is None or parsed.layer is None or parsed.layer not in self.layers:
            return None
        _, _, rest = stored.partition(f"model.layers.{parsed.layer}.")
        return f"model.layers.{self.layers[parsed.layer]}.{rest}"


def find_module(checkpoint: Checkpoint, dims: ModelConfig) -> Module:
    """Returns the MTP module that a checkpoint has.

    Args:
        checkpoint: the module's; whatever else is in it does not count.
        dims: of the main model.

    Raises:
        CheckpointError: there is no module, or it is one for other dimensions.
    """
    parsed = (parse_name(name) for name in checkpoint.specs if name.endswith(".eh_proj.weight"))
    numbers = sorted(name.layer for name in parsed if name is not None and name.layer is not None)
    if not numbers:
        raise CheckpointError(
            f"{checkpoint.source}: no eh_proj.weight in any layer: there is no MTP module here"
        )
    values = ((key, getattr(checkpoint.config, key), getattr(dims, key)) for key in _SHARED)
    wrong = [f"{name} is {own}, the main model has {main}" for name, own, main in values if own != main]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.where(CONFIG_NAME)}: a module for another model: {'; '.join(wrong)}"
        )
    return Module(
        checkpoint, {number: dims.num_hidden_layers + place for place, number in enumerate(numbers)}
    )
