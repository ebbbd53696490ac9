"""Fills the table of README.md from a `training.json`.

python3 -m miniature.readme DIR/training.json     from the repository's root
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["render_readme"]

BEGIN, END = "<!-- training.json: begin -->", "<!-- training.json: end -->"


def render_readme(text: str, training: dict[str, Any]) -> str:
    """Returns `text` with a table of `training` between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(training))
    return f"{text[:before]}\n| | |\n|---|---|\n{rows}\n{text[after:]}"


def _rows(training: dict[str, Any]) -> list[tuple[str, str]]:
    master, fp8 = training["heldout_bf16_master"], training["heldout_fp8"]
    parameters, corpus, versions = training["parameters"], training["corpus"], training["versions"]
    return [
        ("parameters, all tensors", f"{parameters['total']:,}"),
        ("main model; used by one token", f"{parameters['main']:,}; {parameters['main_active']:,}"),
        ("MTP layer, with its two copies", f"{parameters['mtp_layer_with_copies']:,}"),
        ("corpus", f"{corpus['num_files']:,} files, {corpus['nbytes'] / 1e6:.1f} MB"),
        ("training tokens, distinct", f"{corpus['num_tokens_train']:,}"),
        ("steps; tokens seen", f"{training['steps']:,}; {training['tokens']:,}"),
        ("held-out loss, BF16 master", f"{master['loss']:.4f} nats per token"),
        ("held-out loss, this FP8 checkpoint", f"{fp8['loss']:.4f} nats per token"),
        ("MTP loss", f"{fp8['mtp_loss']:.4f} nats per token"),
        ("MTP top-1 accuracy", f"{fp8['mtp_top1_accuracy']:.2%}"),
        ("MTP acceptance", f"{fp8['mtp_acceptance']:.2%}"),
        ("router load, largest over mean less 1", ", ".join(map(str, training["router_max_violation"]))),
        ("made with", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def main() -> None:
    """Rewrites the README.md beside this file."""
    training = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    readme = Path(__file__).with_name("README.md")
    readme.write_text(render_readme(readme.read_text(encoding="utf-8"), training), encoding="utf-8")


if __name__ == "__main__":
    main()
