"""How a calibrated quantization is done: what changes the bytes that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsv3_tools.errors import UsageError

__all__ = ["METHODS", "Recipe"]

METHODS = ("gptq", "rtn-weighted")


@dataclass(frozen=True)
class Recipe:
    """What is done with every weight.

    Attributes:
        method: "gptq", or "rtn-weighted", which only chooses scales by the inputs.
        damping: what is added to a Hessian's diagonal, as a part of its mean.
    """

    method: str = "gptq"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        if not 0.0 < self.damping <= 1.0:
            raise UsageError(f"--damping {self.damping}: expected more than 0 and at most 1, such as 0.01")

    def record(self) -> Mapping[str, Any]:
        """Returns what goes into plan and manifest."""
        return asdict(self)
