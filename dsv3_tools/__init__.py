"""Rewrites DeepSeek-V3-family checkpoints between weight layouts, and proves that the result is right.

Every command is a function here, of the same name and with the same keywords:

>>> import dsv3_tools
>>> report = dsv3_tools.inspect("miniature/checkpoint")
>>> report.num_tensors > 0
True

Nothing heavy is imported until a function is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3_tools.checkpoint.reader import Checkpoint
    from dsv3_tools.conversion.api import convert_bf16_to_fp8, convert_fp8_to_bf16
    from dsv3_tools.conversion.api_deepseek_infer import convert_to_deepseek_infer
    from dsv3_tools.conversion.api_integer import convert_int4_to_bf16, convert_int8_to_bf16
    from dsv3_tools.conversion.api_mtp import SplitResult, merge_mtp, split_mtp
    from dsv3_tools.conversion.card import CardResult, card
    from dsv3_tools.conversion.executor import RunResult
    from dsv3_tools.conversion.plan import Plan
    from dsv3_tools.conversion.progress import Progress, Stop
    from dsv3_tools.conversion.push import PushResult, push
    from dsv3_tools.conversion.ranks import Ranks
    from dsv3_tools.conversion.sample import SampleResult, sample
    from dsv3_tools.errors import Dsv3Error
    from dsv3_tools.quantize.api_int4 import quantize_int4
    from dsv3_tools.quantize.api_int8 import quantize_int8
    from dsv3_tools.verify.check import CheckReport, check
    from dsv3_tools.verify.inspection import Inspection, inspect
    from dsv3_tools.verify.integrity import IntegrityReport, verify_integrity
    from dsv3_tools.verify.logits import verify_logits
    from dsv3_tools.verify.logits_results import LogitsReport
    from dsv3_tools.verify.mtp import MtpReport, verify_mtp
    from dsv3_tools.verify.structure import StructureReport, verify_structure
    from dsv3_tools.verify.tensors import TensorReport, verify_tensors

__version__ = "0.1.0"

__all__ = [
    "CardResult",
    "CheckReport",
    "Checkpoint",
    "Dsv3Error",
    "Inspection",
    "IntegrityReport",
    "LogitsReport",
    "MtpReport",
    "Plan",
    "Progress",
    "PushResult",
    "Ranks",
    "RunResult",
    "SampleResult",
    "SplitResult",
    "Stop",
    "StructureReport",
    "TensorReport",
    "__version__",
    "card",
    "check",
    "convert_bf16_to_fp8",
    "convert_fp8_to_bf16",
    "convert_int4_to_bf16",
    "convert_int8_to_bf16",
    "convert_to_deepseek_infer",
    "inspect",
    "merge_mtp",
    "push",
    "quantize_int4",
    "quantize_int8",
    "sample",
    "split_mtp",
    "verify_integrity",
    "verify_logits",
    "verify_mtp",
    "verify_structure",
    "verify_tensors",
]

_HOMES = {
    "CardResult": "dsv3_tools.conversion.card",
    "CheckReport": "dsv3_tools.verify.check",
    "Checkpoint": "dsv3_tools.checkpoint.reader",
    "Dsv3Error": "dsv3_tools.errors",
    "Inspection": "dsv3_tools.verify.inspection",
    "IntegrityReport": "dsv3_tools.verify.integrity",
    "LogitsReport": "dsv3_tools.verify.logits_results",
    "MtpReport": "dsv3_tools.verify.mtp",
    "Plan": "dsv3_tools.conversion.plan",
    "Progress": "dsv3_tools.conversion.progress",
    "PushResult": "dsv3_tools.conversion.push",
    "Ranks": "dsv3_tools.conversion.ranks",
    "RunResult": "dsv3_tools.conversion.executor",
    "SampleResult": "dsv3_tools.conversion.sample",
    "SplitResult": "dsv3_tools.conversion.api_mtp",
    "Stop": "dsv3_tools.conversion.progress",
    "StructureReport": "dsv3_tools.verify.structure",
    "TensorReport": "dsv3_tools.verify.tensors",
    "card": "dsv3_tools.conversion.card",
    "check": "dsv3_tools.verify.check",
    "convert_bf16_to_fp8": "dsv3_tools.conversion.api",
    "convert_fp8_to_bf16": "dsv3_tools.conversion.api",
    "convert_int4_to_bf16": "dsv3_tools.conversion.api_integer",
    "convert_int8_to_bf16": "dsv3_tools.conversion.api_integer",
    "convert_to_deepseek_infer": "dsv3_tools.conversion.api_deepseek_infer",
    "inspect": "dsv3_tools.verify.inspection",
    "merge_mtp": "dsv3_tools.conversion.api_mtp",
    "push": "dsv3_tools.conversion.push",
    "quantize_int4": "dsv3_tools.quantize.api_int4",
    "quantize_int8": "dsv3_tools.quantize.api_int8",
    "sample": "dsv3_tools.conversion.sample",
    "split_mtp": "dsv3_tools.conversion.api_mtp",
    "verify_integrity": "dsv3_tools.verify.integrity",
    "verify_logits": "dsv3_tools.verify.logits",
    "verify_mtp": "dsv3_tools.verify.mtp",
    "verify_structure": "dsv3_tools.verify.structure",
    "verify_tensors": "dsv3_tools.verify.tensors",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
