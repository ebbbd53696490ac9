"""`README.md`: the model card of a result, made of facts alone, around what its user has written.

No time, no host and no path of this machine is in it, nor the directory's name: equal runs give equal cards.
The card is in no manifest, so that its user may edit it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.durable import write_file
from dsv3_tools.checkpoint.manifest import FIGURES_NAME, MANIFEST_NAME, manifest_sha256
from dsv3_tools.checkpoint.paths import read_small_file
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.card_body import CardSource, card_body, card_metadata
from dsv3_tools.conversion.card_figures import encode_figures, read_figures, read_report
from dsv3_tools.conversion.card_yaml import CARD_NAME, MAX_CARD_BYTES, Card, parse_card
from dsv3_tools.conversion.destination import read_manifest
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.serving import planned_view
from dsv3_tools.engines import ModelView
from dsv3_tools.errors import CheckpointError

__all__ = ["CardResult", "card", "card_problem", "planned_card"]


@dataclass(frozen=True)
class CardResult:
    """What `card` did.

    Attributes:
        path: of the card.
        written: whether it is another one now.
        figures: the reports whose figures are in it.
    """

    path: Path
    written: bool
    figures: tuple[str, ...]


def card(directory: str | os.PathLike[str], *, figures: Sequence[str | os.PathLike[str]] = ()) -> CardResult:
    """Writes the model card of a result again, around what its user has written in it.

    Example:
        >>> import dsv3_tools, tempfile
        >>> made = tempfile.mkdtemp()
        >>> _ = dsv3_tools.convert_fp8_to_bf16("miniature/checkpoint", made, device="cpu")
        >>> card(made).written
        False

    Args:
        directory: a result of this program.
        figures: files that hold what `dsv3 verify logits|tensors|mtp --json` printed about it. Their main
            figures stay in `dsv3_figures.json` and so in later cards.

    Raises:
        CheckpointError: the directory has no manifest of this program, its `README.md` is not to be read, or
            a file of figures is none.
        UsageError: figures of something else.
        DestinationError: the disk does not do its part.
    """
    folder = Path(directory)
    if not (folder / MANIFEST_NAME).exists():
        raise CheckpointError(f"{folder}: has no {MANIFEST_NAME}, expected a result of dsv3-tools")
    manifest = read_manifest(folder)
    sha256 = manifest_sha256(manifest)
    earlier, known = _existing(folder), read_figures(folder, sha256)
    added = dict(read_report(Path(path), folder, sha256) for path in figures)
    found = {**known, **added}
    try:
        text = _render(earlier, CardSource(manifest, sha256, _view(folder, manifest), found))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME}: lacks what a card is made of ({type(error).__name__}: {error})"
        ) from error
    if added:
        write_file(folder / FIGURES_NAME, encode_figures(found, sha256), folder=folder)
    path = folder / CARD_NAME
    written = not path.exists() or path.read_bytes() != text
    if written:
        write_file(path, text, folder=folder)
    return CardResult(path, written, tuple(found))


def planned_card(plan: Plan, manifest: Mapping[str, Any], destination: Path) -> bytes | None:
    """Returns the card of a run that is about to end; None if `card_problem` says why there is none."""
    if card_problem(destination) is not None:
        return None
    sha256 = manifest_sha256(manifest)
    figures = read_figures(destination, sha256)
    return _render(_existing(destination), CardSource(manifest, sha256, planned_view(plan), figures))


def card_problem(directory: Path) -> str | None:
    """Returns why a run writes no card over what is there, which cannot be read; None if nothing is wrong."""
    try:
        _existing(directory)
        read_figures(directory, "")
    except CheckpointError as error:
        return str(error)
    return None


def _render(earlier: Card, source: CardSource) -> bytes:
    return earlier.renewed(card_metadata(source), card_body(source)).encode()


def _existing(directory: Path) -> Card:
    """Returns the card that is there, taken apart, or an empty one."""
    if not os.path.lexists(directory / CARD_NAME):
        return Card()
    text = read_small_file(directory, CARD_NAME, MAX_CARD_BYTES)
    return parse_card(text, str(directory / CARD_NAME))


def _view(directory: Path, manifest: Mapping[str, Any]) -> ModelView | None:
    """Returns a result as the rules about engines see it; None for rank shards."""
    if manifest.get("operation") == "to-deepseek-infer":
        return None
    with Checkpoint(directory) as checkpoint:
        return ModelView(checkpoint.specs, checkpoint.config_json, checkpoint.weight_map)
