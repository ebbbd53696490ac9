"""Rules about tensor parallelism: what each rank gets must be whole heads, blocks and groups."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_tools.engines.engine import Engine
from dsv3_tools.engines.model import ModelView, ModuleGroup
from dsv3_tools.engines.problems import Problem
from dsv3_tools.engines.rules_tensors import seen

__all__ = ["RULES"]

_BY_ROWS = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_BLOCKS = frozenset({"fp8-block", "int8-block", "fp8-ct-block"})
_BLOCK_SOURCE = (
    "vLLM 0.32, fp8.py, SGLang 0.5.23, blockwise_int8.py: validation of block shapes (read); SGLang #3345, "
    "vLLM #12256, TensorRT-LLM #2776"
)


def _kinds(view: ModelView, engine: Engine) -> dict[str, ModuleGroup]:
    """Returns one group of each kind of linear that ranks share, and for each storage of it."""
    found: dict[str, ModuleGroup] = {}
    for group in seen(view, engine):
        shape = group.storage.shape
        if group.is_linear and shape is not None and len(shape) == 2:
            found.setdefault(f"{group.kind} {group.storage.format}", group)
    return found


def _split(group: ModuleGroup) -> tuple[str, int] | None:
    """Returns which dimension of a linear ranks share, and its size."""
    last = group.kind.rpartition(".")[2]
    assert group.storage.shape is not None
    if last in _BY_ROWS:
        return "rows", group.storage.shape[0]
    return ("columns", group.storage.shape[1]) if last in _BY_COLUMNS else None


def _heads(view: ModelView, engine: Engine, tp: int) -> Iterator[Problem]:
    """Whole attention heads, and for the demo whole experts and rows of the vocabulary."""
    counts = {"num_attention_heads": view.dimensions.num_attention_heads}
    if engine.name == "deepseek-infer":
        counts["n_routed_experts"] = view.dimensions.n_routed_experts
        counts["vocab_size"] = view.dimensions.vocab_size
    for key, count in counts.items():
        if engine.name != "transformers" and count % tp:
            yield Problem(
                "tp-heads",
                "refused",
                f"config.json: {key} is {count:,}, which {tp} ranks cannot share evenly; choose a divisor",
                f"{engine.title} {engine.version}, its DeepSeek model (read)",
            )


def _whole(view: ModelView, engine: Engine, tp: int) -> Iterator[Problem]:
    """Rows and columns that ranks share must divide at all."""
    if tp == 1 or engine.name == "transformers":
        return
    for group in _kinds(view, engine).values():
        part = _split(group)
        experts = group.kind.startswith("mlp.experts") and engine.name == "deepseek-infer"
        if part is not None and part[1] % tp and not experts:
            yield Problem(
                "tp-shape",
                "refused",
                f"{group.kind}: its {part[1]:,} {part[0]} cannot be shared evenly by {tp} ranks",
                f"{engine.title} {engine.version}: parallel linears (read)",
            )


def _blocks(view: ModelView, engine: Engine, tp: int) -> Iterator[Problem]:
    """A rank's part of a block-quantized weight must be whole blocks; so must both halves of gate and up."""
    if engine.name == "transformers":
        return
    for group in _kinds(view, engine).values():
        part = _split(group)
        if group.storage.format not in _BLOCKS or part is None:
            continue
        dimension, size = part
        block = view.block[0 if dimension == "rows" else 1]
        merged = group.kind.endswith(("gate_proj", "up_proj")) and "gate and up" in engine.fused
        whole_experts = group.kind.startswith("mlp.experts") and engine.name == "deepseek-infer"
        if whole_experts or (tp == 1 and not merged) or size % tp or (size // tp) % block == 0:
            continue
        refines = engine.name == "vllm" and group.kind.startswith("mlp.experts") and tp > 1
        yield Problem(
            "tp-blocks",
            "note" if refines else "refused",
            f"{group.kind}: {size:,} {dimension} over {tp} ranks are {size // tp:,}, expected whole "
            f"blocks of {block}; "
            + (
                "vLLM refines the scales of experts"
                if refines
                else "choose fewer ranks, or expert parallelism"
            ),
            _BLOCK_SOURCE,
        )


def _is_whole_row(view: ModelView, size: int, columns: int) -> bool:
    """Whether a scale is for a whole output by design, which any number of ranks may share."""
    return size == columns and any(scheme.group_size == -1 for scheme in view.schemes)


def _int4(view: ModelView, engine: Engine, tp: int) -> Iterator[Problem]:
    """A rank's inputs must be whole groups, and what Marlin's tiles can hold."""
    if engine.family not in ("vllm", "sglang"):
        return
    for group in _kinds(view, engine).values():
        storage, part = group.storage, _split(group)
        if storage.format not in ("int4-ct", "gptq", "awq", "w4afp8") or storage.shape is None:
            continue
        rows, columns = storage.shape
        rows = rows // tp if part is not None and part[0] == "rows" else rows
        columns = columns // tp if part is not None and part[0] == "columns" else columns
        size = storage.group_size
        if size and not _is_whole_row(view, size, storage.shape[1]) and columns % size:
            yield Problem(
                "tp-groups",
                "refused",
                f"{group.kind}: {storage.shape[1]:,} columns over {tp} ranks are {columns:,}, expected whole "
                f"groups of {size}; choose fewer ranks, expert parallelism, or a smaller group",
                f"{engine.title} {engine.version}: {storage.format} (read)",
            )
        elif rows % 64 or columns % 128:
            yield Problem(
                "tp-marlin",
                "note",
                f"{group.kind}: a rank has [{rows:,}, {columns:,}], Marlin wants rows in 64s and columns in "
                "128s; a slower kernel runs, or none is found",
                "vLLM 0.32, utils/marlin_utils.py (read)",
            )


RULES = (_heads, _whole, _blocks, _int4)
"""Rules of this theme, in the order in which their findings are shown."""
