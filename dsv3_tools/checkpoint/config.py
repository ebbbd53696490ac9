"""`config.json`: the model's dimensions, and the edits that a conversion makes.

The file is edited as JSON text: key order and all other keys stay, because engines read keys that no
model library knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dsv3_tools.checkpoint.header import load_json
from dsv3_tools.errors import CheckpointError, HeaderError

__all__ = [
    "CONFIG_NAME",
    "MAX_CONFIG_BYTES",
    "MODEL_TYPES",
    "NEXTN_ARCHITECTURE",
    "ModelConfig",
    "encode_config",
    "parse_config",
    "with_quantization",
]

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 10_000_000

MODEL_TYPES = {
    "deepseek_v3": "DeepSeek-V3, V3-0324, R1, R1-0528, V3.1, Moonlight",
    "deepseek_v32": "DeepSeek-V3.2",
    "kimi_k2": "Kimi-K2",
}
"""`model_type` of every model that shares the architecture, with who uses it."""

NEXTN_ARCHITECTURE = "DeepseekV3ForCausalLMNextN"
"""What SGLang calls an MTP module that is exported as a model of its own, with the one layer 0."""

_MAX_DIMENSION = 2**31 - 1
_MAX_EXPERTS = 200_000  # of all layers together; DeepSeek-V3 has 15,872, Kimi-K2 23,424


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Every dimension of a model, from `config.json` alone; names as there.

    `q_lora_rank` is None for models whose queries have no low-rank factor (Moonlight);
    `index_*` are None for models without the sparse-attention indexer (all but V3.2). `is_nextn` says that
    this is no model but an exported MTP module, whose layers are all that `num_hidden_layers` counts.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 0
    num_nextn_predict_layers: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    tie_word_embeddings: bool = False
    is_nextn: bool = False

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], where: str = CONFIG_NAME) -> ModelConfig:
        """Returns the dimensions in a parsed `config.json`.

        Raises:
            CheckpointError: another kind of model, or a dimension missing or impossible.
        """
        _check_model_type(document, where)
        values: dict[str, Any] = {"is_nextn": document.get("architectures") == [NEXTN_ARCHITECTURE]}
        for field in fields(cls):
            if field.name == "is_nextn":
                continue
            value = document.get(field.name)
            if value is None and field.name in _OPTIONAL:
                continue
            values[field.name] = _check_value(field.name, value, where)
        config = cls(**values)
        config._check_sizes(where)
        return config

    def _check_sizes(self, where: str) -> None:
        """Refuses numbers that no model has, before anything loops over them."""
        if self.num_experts_per_tok > self.n_routed_experts:
            raise CheckpointError(
                f"{where}: num_experts_per_tok is {self.num_experts_per_tok}, "
                f"expected at most n_routed_experts, {self.n_routed_experts}"
            )
        experts = (self.num_hidden_layers + self.num_nextn_predict_layers) * self.n_routed_experts
        if experts > _MAX_EXPERTS:
            raise CheckpointError(
                f"{where}: num_hidden_layers and n_routed_experts make {experts:,} experts, "
                f"expected at most {_MAX_EXPERTS:,}"
            )

    @property
    def qk_head_dim(self) -> int:
        """Rows of a query or key per head: without rope, then with rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def main_layers(self) -> range:
        """Layer numbers of the model itself; none in an exported MTP module."""
        return range(0 if self.is_nextn else self.num_hidden_layers)

    @property
    def mtp_layers(self) -> range:
        """Layer numbers of the MTP module: they follow the model's own layers."""
        if self.is_nextn:
            return range(self.num_hidden_layers)
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has a router and experts instead of one dense MLP; MTP layers always have."""
        if layer in self.mtp_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


_OPTIONAL = {
    "q_lora_rank",
    "n_shared_experts",
    "num_nextn_predict_layers",
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "index_n_heads",
    "index_head_dim",
    "tie_word_embeddings",
}
_MAY_BE_ZERO = {"first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"}


def parse_config(text: bytes, where: str = CONFIG_NAME) -> dict[str, Any]:
    """Returns `config.json` as a dictionary in the file's key order.

    Raises:
        CheckpointError: not a JSON object.
    """
    try:
        document = load_json(text, where)
    except HeaderError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{where}: {type(document).__name__}, expected a JSON object")
    return document


def encode_config(document: Mapping[str, Any]) -> bytes:
    """Returns the text of a `config.json`, as transformers indents it."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def with_quantization(
    document: Mapping[str, Any], quantization_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns `document` with this `quantization_config`; None removes the key.

    Removed, not set to null: vLLM and LightLLM go by the key's presence. A new key goes where the old one
    was, to its place among keys that are sorted (as those of released files are), or else to the end.
    """
    edited = {key: value for key, value in document.items() if key != "quantization_config"}
    if quantization_config is None:
        return edited
    whole = {**document, "quantization_config": dict(quantization_config)}
    if "quantization_config" not in document and list(edited) == sorted(edited):
        return dict(sorted(whole.items()))
    return whole


def _check_model_type(document: Mapping[str, Any], where: str) -> None:
    """Refuses a model that is not of the family.

    Raises:
        CheckpointError: with the model type found and those that are known.
    """
    model_type = document.get("model_type")
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return
    known = ", ".join(f"{name} ({who})" for name, who in MODEL_TYPES.items())
    if model_type == "deepseek_v4":
        raise CheckpointError(
            f"{where}: DeepSeek-V4 (model_type 'deepseek_v4') stores FP4 experts under other names and is "
            f"not supported; supported are {known}"
        )
    raise CheckpointError(f"{where}: model_type is {str(model_type)[:100]!r}, expected one of {known}")


def _check_value(name: str, value: Any, where: str) -> Any:
    if name == "model_type":
        return value
    if name == "tie_word_embeddings":
        if not isinstance(value, bool):
            raise CheckpointError(f"{where}: {name} is {str(value)[:100]!r}, expected true or false")
        return value
    least = 0 if name in _MAY_BE_ZERO else 1
    if type(value) is not int or not least <= value <= _MAX_DIMENSION:
        found = "missing" if value is None else f"{str(value)[:100]!r}"
        raise CheckpointError(
            f"{where}: {name} is {found}, expected a whole number from {least} to {_MAX_DIMENSION:,}"
        )
    return value
