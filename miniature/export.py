"""The trained weights as a checkpoint in the released FP8 layout, and back.

Names and dtypes are those of the DeepSeek-V3 release: one tensor for each expert's projection, F8_E4M3
weights with F32 `weight_scale_inv`, BF16 for embeddings, norms, routers and `eh_proj`, F32 for
`e_score_correction_bias`, the MTP layer as layer `num_hidden_layers` with its own copies of the embedding
and the head. transformers' `save_pretrained` writes none of that, so the files are written here.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3_tools.kernels.reference import dequantize_fp8_block, quantize_fp8_block
from miniature.model import CONFIG, MtpLayer, build

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM

__all__ = [
    "decode",
    "encode",
    "from_released",
    "read_checkpoint",
    "released_weights",
    "write_bf16_checkpoint",
    "write_checkpoint",
    "write_json",
]

NUM_SHARDS = 4
NUM_SCALES_APART = 4
"""So many scales at the end of a shard lie in the next one, as a weight and its scale do in the release."""

_FP8_WEIGHT = re.compile(r"(?<!\.eh)_proj(_with_mqa)?\.weight$")
_MTP_PREFIX = f"model.layers.{CONFIG['num_hidden_layers']}."
_SHARED_WITH_MAIN = {
    _MTP_PREFIX + "embed_tokens.weight": "model.embed_tokens.weight",
    _MTP_PREFIX + "shared_head.head.weight": "lm_head.weight",
}


def released_weights(model: DeepseekV3ForCausalLM, mtp: MtpLayer) -> dict[str, Tensor]:
    """Returns all weights under their released names, on the CPU, rounded to BF16 (the bias stays F32)."""
    state = dict(model.state_dict())
    state |= {_MTP_PREFIX + name: tensor for name, tensor in mtp.state_dict().items()}
    state |= {copy: state[original] for copy, original in _SHARED_WITH_MAIN.items()}
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for released_name, part in _split_experts(name, tensor.detach().cpu()):
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            weights[released_name] = part.to(dtype).clone(memory_format=torch.contiguous_format)
    return weights


def _split_experts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Returns transformers' fused expert tensors `[experts, out, in]` one by one; others as they are."""
    prefix, _, kind = name.rpartition(".")
    if kind == "gate_up_proj":
        halves = [expert.chunk(2) for expert in tensor]
        pairs = [("gate_proj", gate, "up_proj", up) for gate, up in halves]
        return [
            (f"{prefix}.{e}.{part}.weight", weight)
            for e, (gate, gate_weight, up, up_weight) in enumerate(pairs)
            for part, weight in ((gate, gate_weight), (up, up_weight))
        ]
    if kind == "down_proj":
        return [(f"{prefix}.{e}.down_proj.weight", expert) for e, expert in enumerate(tensor)]
    return [(name, tensor)]


def from_released(weights: dict[str, Tensor]) -> tuple[DeepseekV3ForCausalLM, MtpLayer]:
    """Returns models that hold `weights` (see `released_weights`) exactly, in float32.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor is left over, or a copy is not equal to its original.
    """
    left = dict(weights)
    for copy, original in _SHARED_WITH_MAIN.items():
        if not torch.equal(left.pop(copy), left[original]):
            raise ValueError(f"{copy}: got other values than {original}, expected a copy")
    model, mtp = build()
    for module, prefix in ((model, ""), (mtp, _MTP_PREFIX)):
        state = {name: _take(left, prefix + name) for name in module.state_dict()}
        module.load_state_dict(state)
    if left:
        raise ValueError(f"got unexpected tensors: {sorted(left)}")
    return model.eval(), mtp.eval()


def _take(weights: dict[str, Tensor], name: str) -> Tensor:
    """Removes and returns the tensor that transformers calls `name`, its experts fused."""
    prefix, _, kind = name.rpartition(".")
    if kind not in ("gate_up_proj", "down_proj"):
        return weights.pop(name).float()
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    experts = range(CONFIG["n_routed_experts"])
    fused = [torch.cat([weights.pop(f"{prefix}.{e}.{part}.weight") for part in parts]) for e in experts]
    return torch.stack(fused).float()


def encode(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the FP8 checkpoint, each scale right after its weight."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if _FP8_WEIGHT.search(name):
            tensors[name], tensors[name + "_scale_inv"] = quantize_fp8_block(weight)
        else:
            tensors[name] = weight
    return tensors


def decode(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the BF16 weights that the tensors of an FP8 checkpoint stand for."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name, tensor in weights.items():
        if tensor.dtype == torch.float8_e4m3fn:
            weights[name] = dequantize_fp8_block(tensor, tensors[name + "_scale_inv"])
    return weights


def write_checkpoint(tensors: dict[str, Tensor], directory: Path) -> None:
    """Writes shards, index, config.json and generation_config.json; every file is readable by all."""
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(index, directory / "model.safetensors.index.json")
    write_json(CONFIG, directory / "config.json")
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}
    write_json(generation, directory / "generation_config.json")
    for path in directory.iterdir():
        path.chmod(0o644)


def _shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Returns the names of each shard: about equal bytes, and some scales apart from their weights."""
    limit = sum(tensor.nbytes for tensor in tensors.values()) / NUM_SHARDS
    shards: list[list[str]] = [[] for _ in range(NUM_SHARDS)]
    nbytes = 0
    for name, tensor in tensors.items():
        shards[min(int(nbytes / limit), NUM_SHARDS - 1)].append(name)
        nbytes += tensor.nbytes
    for shard, following in itertools.pairwise(shards):
        apart = [name for name in shard if name.endswith("_scale_inv")][-NUM_SCALES_APART:]
        shard[:] = [name for name in shard if name not in apart]
        following[:0] = apart
    return shards


def read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """Returns all tensors that the index of a checkpoint names."""
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    loaded = {file_name: load_file(directory / file_name) for file_name in set(index["weight_map"].values())}
    return {name: loaded[file_name][name] for name, file_name in index["weight_map"].items()}


def write_bf16_checkpoint(weights: dict[str, Tensor], directory: Path) -> None:
    """Writes the main model's `weights` as one file that transformers' `from_pretrained` loads."""
    main = {name: weight for name, weight in weights.items() if not name.startswith(_MTP_PREFIX)}
    save_file(main, directory / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    write_json(config, directory / "config.json")


def write_json(value: dict[str, Any], path: Path) -> None:
    """Writes `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
