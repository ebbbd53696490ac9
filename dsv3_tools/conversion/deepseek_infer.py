"""The planner of `convert to-deepseek-infer`: one shard for each rank of DeepSeek's inference demo.

The demo's own converter holds all ranks in memory. This plan has a step for each part of a tensor, and
every step copies bytes: nothing is decoded.

Source, for names, cuts and what is loaded: `inference/convert.py` and `inference/model.py` of
deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch

from dsv3_tools.checkpoint.config import CONFIG_NAME, ModelConfig, encode_config
from dsv3_tools.checkpoint.deepseek_infer import INFER_CONFIG_NAME, rank_shard_name
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.card_facts import source_card
from dsv3_tools.conversion.deepseek_infer_config import model_args, unlike_demo, without_counterpart
from dsv3_tools.conversion.plan import SOURCE, Plan, ShardPlan, Share, Step, TensorRef
from dsv3_tools.conversion.planning import check_plan, repositories, source_files
from dsv3_tools.errors import CheckpointError, FormatError, UsageError, join_problems
from dsv3_tools.formats import FP8Block
from dsv3_tools.formats.fp8_block import SCALE_PART
from dsv3_tools.formats.stored import Stored, StoredWeight, find_weights, read_formats

__all__ = ["plan_to_deepseek_infer"]

_MODULES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attn.wq", 0),
    "self_attn.q_a_proj": ("attn.wq_a", None),
    "self_attn.q_a_layernorm": ("attn.q_norm", None),
    "self_attn.q_b_proj": ("attn.wq_b", 0),
    "self_attn.kv_a_proj_with_mqa": ("attn.wkv_a", None),
    "self_attn.kv_a_layernorm": ("attn.kv_norm", None),
    "self_attn.kv_b_proj": ("attn.wkv_b", 0),
    "self_attn.o_proj": ("attn.wo", 1),
    "mlp.gate_proj": ("ffn.w1", 0),
    "mlp.down_proj": ("ffn.w2", 1),
    "mlp.up_proj": ("ffn.w3", 0),
    "mlp.gate": ("ffn.gate", None),
    "mlp.experts.gate_proj": ("ffn.experts.{}.w1", None),
    "mlp.experts.down_proj": ("ffn.experts.{}.w2", None),
    "mlp.experts.up_proj": ("ffn.experts.{}.w3", None),
    "mlp.shared_experts.gate_proj": ("ffn.shared_experts.w1", 0),
    "mlp.shared_experts.down_proj": ("ffn.shared_experts.w2", 1),
    "mlp.shared_experts.up_proj": ("ffn.shared_experts.w3", 0),
}
"""The demo's name for every module, and the axis along which ranks share it (routed experts go whole to one
rank, all else without an axis to every one).

Source: the mapping in `inference/convert.py`; which modules are parallel, `inference/model.py`."""

_PARAMETERS = {"weight": "weight", SCALE_PART: "scale", "e_score_correction_bias": "bias"}
"""The demo's name for every parameter. Source: the same two files."""

_ROUTER_BIAS = ("mlp.gate", "e_score_correction_bias")

_TOKENIZER_FILES = "*token*"
"""What the demo's converter copies, beside the weights."""


def plan_to_deepseek_infer(checkpoint: Checkpoint, *, model_parallel: int, partial: bool = False) -> Plan:
    """Returns the plan that renames every tensor of the model and cuts it for `model_parallel` ranks.

    Args:
        checkpoint: a BF16 checkpoint, or an FP8 one in the released layout.
        model_parallel: the number of ranks, which is that of the demo's processes.
        partial: the checkpoint is only a part of the model that `config.json` describes.

    Raises:
        UsageError: `model_parallel` does not divide what has to be cut, all of it.
        CheckpointError: a model that the demo cannot run.
        FormatError: weights in a format that the demo cannot read.
        PlanError: tensors that do not add up, all of them.
    """
    if model_parallel < 1:
        raise UsageError(f"model_parallel: got {model_parallel}, expected 1 or more ranks")
    config, where = checkpoint.config, checkpoint.where(CONFIG_NAME)
    if problems := list(without_counterpart(checkpoint.config_json, config)):
        raise CheckpointError(f"{where}: {'; '.join(problems)}: DeepSeek's inference demo has no such model")
    fp8 = _stated_format(checkpoint, where)
    stored = find_weights(checkpoint.specs, () if fp8 is None else (fp8,))
    dropped = _dropped(checkpoint, stored)
    kept = [weight for weight in stored.weights if weight.code_name not in dropped]
    if problems := [*_uneven(config, model_parallel), *_uncut(kept, model_parallel, fp8)]:
        raise UsageError(f"--model-parallel {model_parallel}: {join_problems(problems)}")
    refused = {w.code_name: reason for w in kept if (reason := _refusal(w, fp8, config)) is not None}
    ranks: list[list[Step]] = [[] for _ in range(model_parallel)]
    for weight in kept:
        if weight.code_name not in refused:
            for rank, step in _steps(weight, model_parallel, config.n_routed_experts):
                ranks[rank].append(step)
    steps = [step for rank in ranks for step in rank]
    check_plan(checkpoint, stored, steps, partial=partial, refused=refused, dropped=dropped)
    return _plan(checkpoint, ranks, dropped, fp8)


def _plan(
    checkpoint: Checkpoint, ranks: Sequence[Sequence[Step]], dropped: Mapping[str, str], fp8: FP8Block | None
) -> Plan:
    travel, stay = checkpoint.side_files()
    copied = tuple(name for name in travel if fnmatch(name, _TOKENIZER_FILES))
    shards = [ShardPlan.build(rank_shard_name(rank, len(ranks)), steps) for rank, steps in enumerate(ranks)]
    return Plan(
        operation="to-deepseek-infer",
        options={"model_parallel": len(ranks)},
        shards=tuple(shards),
        dropped=dropped,
        config=encode_config(model_args(checkpoint.config_json, checkpoint.config, fp8)),
        side_files=copied,
        left_behind=tuple(sorted({*travel, *stay} - set(copied))),
        source_files=source_files({SOURCE: checkpoint}, copied),
        nbytes_in=checkpoint.nbytes,
        repositories=repositories({SOURCE: checkpoint}),
        source_card=source_card(checkpoint),
        config_name=INFER_CONFIG_NAME,
        index_name=None,
        notes=tuple(unlike_demo(checkpoint.config_json, checkpoint.config)),
    )


def _steps(weight: StoredWeight, world: int, num_experts: int) -> Iterator[tuple[int, Step]]:
    """Yields rank and step for every part of a weight that a rank gets.

    Codes and scales are steps of their own: the file has all scales first, and is written from its beginning
    to its end.
    """
    name, parts = weight.name, weight.format.parts(weight.shape)
    module, axis = _MODULES[name.module]
    prefix = ("" if name.layer is None else f"layers.{name.layer}.") + module.format(name.expert)
    for part, spec in parts.items():
        parameter = name.parameter if part == weight.format.weight_part else part
        inputs = {"weight": TensorRef(weight.parts[part])}
        outputs = {"weight": f"{prefix}.{_PARAMETERS[parameter]}"}
        whole = Step(spec.shape, inputs, outputs, None, None, spec.dtype)
        if name.expert is not None:
            yield name.expert // (num_experts // world), whole
        elif world == 1:
            yield 0, whole
        else:
            shape = tuple(n // world if side == axis else n for side, n in enumerate(spec.shape))
            for rank in range(world):
                yield rank, replace(whole, shape=shape, share=Share(rank, world, axis))


def _stated_format(checkpoint: Checkpoint, where: str) -> FP8Block | None:
    """Returns the FP8 format of the checkpoint, or None for one that is not quantized.

    Raises:
        FormatError: a format that the demo does not read.
    """
    formats = read_formats(checkpoint.config_json, where)
    if not formats:
        return None
    fmt = formats[0]
    # The demo reads scales of either kind as float32 numbers.
    if len(formats) == 1 and isinstance(fmt, FP8Block) and replace(fmt, scale_fmt="f32") == FP8Block():
        return fmt
    names = " and ".join(dict.fromkeys(fmt.name for fmt in formats))
    detail = ""
    if isinstance(fmt, FP8Block):
        meaning = "reciprocal" if fmt.inverse_scales else "multiplying"
        detail = f" (blocks of {fmt.block_size[0]} x {fmt.block_size[1]}, {meaning} scales {fmt.scale_name})"
    raise FormatError(
        f"{where}: weights are {names}{detail}, DeepSeek's inference demo reads FP8 as released (blocks of "
        f"128 x 128, multiplying scales {SCALE_PART}) and BF16; convert to BF16 first"
    )


def _dropped(checkpoint: Checkpoint, stored: Stored) -> dict[str, str]:
    """Returns the tensors of the MTP module."""
    return {
        name: "DeepSeek's inference demo has no MTP module"
        for weight in stored.weights
        if weight.name.layer is not None and weight.name.layer >= checkpoint.config.num_hidden_layers
        for name in weight.parts.values()
        if name in checkpoint.specs
    }


def _uneven(config: ModelConfig, world: int) -> Iterator[str]:
    """Yields what the demo shares out among the ranks and cannot."""
    for key, what in (
        ("num_attention_heads", "attention heads"),
        ("n_routed_experts", "routed experts"),
        ("vocab_size", "tokens in the vocabulary"),
    ):
        number: int = getattr(config, key)
        if number % world:
            yield f"{number} {what} ({key}) cannot be divided evenly"


def _uncut(weights: Sequence[StoredWeight], world: int, fp8: FP8Block | None) -> Iterator[str]:
    """Yields the modules that cannot be cut into equal parts, of whole blocks where they are FP8.

    Whole, although the demo's converter asks only that rows of scales divide: 160 rows have 2 blocks, and the
    second of two parts of 80 would begin in the middle of one.
    """
    found: Counter[tuple[str, int, int, int]] = Counter()
    for weight in weights:
        _, axis = _MODULES.get(weight.name.module, ("", None))
        if axis is None or axis >= len(weight.shape) or world == 1:
            continue
        block = fp8.block_size[axis] if fp8 is not None and weight.format == fp8 else 1
        if weight.shape[axis] % (world * block):
            found[weight.name.module, axis, weight.shape[axis], block] += 1
    for (module, axis, size, block), count in found.items():
        unit = f"parts of whole blocks of {block}" if block > 1 else "equal parts"
        side = "columns" if axis else "rows"
        yield f"{module} ({count}): {size} {side} cannot be cut into {unit}"


def _refusal(weight: StoredWeight, fp8: FP8Block | None, config: ModelConfig) -> str | None:
    """Returns why the demo cannot load a weight."""
    name = weight.name
    is_bias = (name.module, name.parameter) == _ROUTER_BIAS
    if name.module not in _MODULES or not (is_bias or name.parameter == "weight"):
        return "has no counterpart in DeepSeek's inference demo"
    if name.expert is not None and name.expert >= config.n_routed_experts:
        return f"is of an expert beyond the {config.n_routed_experts} that config.json has"
    if _MODULES[name.module][1] is not None and len(weight.shape) != 2:
        return f"has the shape {list(weight.shape)}, expected two dimensions"
    is_fp8 = fp8 is not None and name.is_fp8_linear
    allowed = ("f32", "bf16") if is_bias else ("fp8_block",) if is_fp8 else ("bf16",)
    if weight.format.name not in allowed:
        return f"is {weight.format.name}, expected {' or '.join(allowed)} (one kind for all such weights)"
    return None
