"""How the engines that load a result are started with it, and why the others do not load it.

Flags beyond the place and the number of GPUs are there for a reason that is in the rules (docs/engines.md) or
in the engine's own documentation: vLLM's of multi-token prediction, SGLang's of speculative decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsv3_tools.conversion.card_text import escape, fenced
from dsv3_tools.engines import ENGINES, ModelView, Verdict, verdict, verdicts

__all__ = ["role", "serving_lines"]

_RANKS = (8, 4, 2)
"""GPUs that a command line may ask for, if what has to be shared among them can be."""

_MTP_JSON = """'{"method": "mtp", "num_speculative_tokens": 1}'"""


def role(view: ModelView | None) -> str:
    """Returns what a result is: "model", "module" (MTP alone), "nextn" (as SGLang has it) or "ranks"."""
    if view is None:
        return "ranks"
    if view.dimensions.is_nextn:
        return "nextn"
    return "model" if view.has_main else "module"


def serving_lines(view: ModelView) -> list[str]:
    """Returns a code block for each engine that loads the result, and the reasons of the others."""
    found = verdicts(view)
    lines = ["By rules about the versions named; no engine was run."]
    for name, one in found.items():
        if one.loads:
            lines += ["", f"**{ENGINES[name].title}** {one.version}:", "", *_block(view, name)]
            lines += _bullets([problem.message for problem in one.notes])
    others = [f"{ENGINES[name].title}: {_reason(one)}" for name, one in found.items() if not one.loads]
    return lines + (["", "Not loaded, or not read right, by", *_bullets(others)] if others else [])


def _bullets(texts: Sequence[str]) -> list[str]:
    return ["", *(f"- {escape(text)}" for text in texts)] if texts else []


def _reason(found: Verdict) -> str:
    """Returns the first reason, and how many there are."""
    first, more = found.failures[0].message, len(found.failures) - 1
    return first + (f" (and {more} more: dsv3 check)" if more else "")


def _block(view: ModelView, engine: str) -> list[str]:
    kind = role(view)
    if kind != "model":
        return fenced(_NEXTN.get(engine, _MODULE) if kind == "nextn" else _MODULE, "sh")
    ranks = next((n for n in _RANKS if verdict(view, engine, n).loads), 1)
    lines = [line.format(ranks=ranks) for line in _MODEL[engine]] + _flags(view, engine)
    is_command = engine not in ("transformers", "deepseek-infer")
    return fenced(_continued(lines) if is_command else lines, "python" if engine == "transformers" else "sh")


def _flags(view: ModelView, engine: str) -> list[str]:
    """Returns the lines of further flags, those without which the engine refuses or does not draft."""
    flags = []
    if engine == "sglang" and any(scheme.format == "int8-channel" for scheme in view.schemes):
        # Without it SGLang takes INT8 experts of compressed-tensors for NPU only (docs/engines.md).
        flags.append("    --quantization w8a8_int8")
    if view.has_mtp:
        flags += _DRAFTING.get(engine, [])
    return flags


def _continued(lines: Sequence[str]) -> list[str]:
    """Returns the lines of one command, all but the last with a backslash."""
    return [*(line + " \\" for line in lines[:-1]), lines[-1]]


_MODEL: Mapping[str, Sequence[str]] = {
    "vllm": ["vllm serve DIR --tensor-parallel-size {ranks}"],
    "sglang": ["python3 -m sglang.launch_server --model-path DIR --tp {ranks}"],
    "transformers": [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto", device_map="auto")',
    ],
    "lmdeploy": ["lmdeploy serve api_server DIR --backend pytorch --tp {ranks}"],
    "tensorrt-llm": ["trtllm-serve DIR --backend pytorch --tp_size {ranks}"],
    "lightllm": ["python -m lightllm.server.api_server --model_dir DIR --tp {ranks}"],
    "deepseek-infer": [
        "dsv3 convert to-deepseek-infer DIR DEMO --model-parallel {ranks}",
        "torchrun --nproc-per-node {ranks} generate.py --ckpt-path DEMO "
        "--config DEMO/deepseek_infer_config.json --interactive",
    ],
    "vllm-ascend": ["vllm serve DIR --tensor-parallel-size {ranks}"],
}

_DRAFTING = {
    "vllm": ["""    --speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'"""],
    "sglang": ["    --speculative-algorithm EAGLE"],
}
"""What makes an engine draft with the MTP module of the model that it serves."""

_MODULE = ["dsv3 merge-mtp MODEL DIR WHOLE"]
"""An MTP module under its own layer number is served as a part of its model."""

_NEXTN: Mapping[str, Sequence[str]] = {
    "sglang": _continued(
        [
            "python3 -m sglang.launch_server --model-path MODEL",
            "    --speculative-algorithm EAGLE --speculative-draft-model-path DIR",
        ]
    ),
}
"""What drafts with the module as it is, beside its model."""
