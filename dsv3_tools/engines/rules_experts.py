"""Rules about the routed experts, which engines join into one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_tools.engines.engine import Engine
from dsv3_tools.engines.model import ModelView
from dsv3_tools.engines.problems import Problem, counted

__all__ = ["RULES"]


def _packed_everywhere(view: ModelView, engine: Engine) -> Iterator[Problem]:
    """With a packed configuration transformers looks for packed experts in every layer."""
    if engine.name != "transformers" or not any(scheme.format == "int4-ct" for scheme in view.schemes):
        return
    modules = [
        module
        for group in view.linears
        if group.kind.startswith("mlp.experts.") and not view.is_mtp(group.layer)
        if group.storage.format != "int4-ct"
        for module in group.modules
    ]
    if modules:
        yield Problem(
            "experts-unpacked",
            "refused",
            f"{counted(modules)}: not packed, but transformers joins packed experts only (torch.cat(): "
            "expected a non-empty list); quantize the experts of every layer",
            "transformers 5.23, core_model_loading.py (tried)",
        )


RULES = (_packed_everywhere,)
"""Rules of this theme, in the order in which their findings are shown."""
