"""The directory that DeepSeek's inference demo reads: one shard for each model-parallel rank.

Source: `inference/convert.py`, which writes `model{rank}-mp{world}.safetensors`, and `inference/generate.py`,
which loads them, of deepseek-ai/DeepSeek-V3. The demo's configuration is a file that its user names; here it
lies beside the shards.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.checkpoint.paths import WORK_FOLDER
from dsv3_tools.errors import CheckpointError

__all__ = ["INFER_CONFIG_NAME", "check_ranks", "holds_ranks", "rank_shard_name"]

INFER_CONFIG_NAME = "deepseek_infer_config.json"
"""The demo's `ModelArgs`, for its option `--config`."""

_RANK_SHARD = re.compile(r"model(0|[1-9]\d{0,4})-mp([1-9]\d{0,4})\.safetensors")


def rank_shard_name(rank: int, world: int) -> str:
    """Returns the name under which the demo looks for a rank's shard."""
    return f"model{rank}-mp{world}.safetensors"


def holds_ranks(directory: Path) -> bool:
    """Whether `directory` is one for the demo, and no Hugging Face checkpoint."""
    if (directory / CONFIG_NAME).exists():
        return False
    return (directory / INFER_CONFIG_NAME).exists() or bool(_rank_shards(directory))


def check_ranks(directory: Path) -> list[str]:
    """Returns the names of the shards of all ranks, in order.

    Raises:
        CheckpointError: a rank is missing, there are those of two conversions, or one has not finished.
    """
    if (directory / WORK_FOLDER).exists():
        raise CheckpointError(f"{directory}: has a {WORK_FOLDER} folder, so a conversion has not finished")
    found = _rank_shards(directory)
    worlds = {int(match[2]) for match in found.values()}
    if len(worlds) != 1:
        conversions = f"shards of {len(worlds)} conversions" if worlds else "no shard"
        raise CheckpointError(f"{directory}: {conversions}, expected those of one")
    (world,) = worlds
    expected = [rank_shard_name(rank, world) for rank in range(world)]
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{directory}: {len(missing)} ranks are missing: {list_names(missing)}")
    if strange := sorted(found.keys() - set(expected)):
        raise CheckpointError(f"{directory}: {world} ranks have no {list_names(strange)}")
    return expected


def _rank_shards(directory: Path) -> dict[str, re.Match[str]]:
    matches = ((path.name, _RANK_SHARD.fullmatch(path.name)) for path in directory.glob("model*.safetensors"))
    return {name: match for name, match in matches if match is not None}
