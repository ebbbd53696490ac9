"""Every way in which a checkpoint directory can be wrong is refused: one line, the culprit, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.errors import CheckpointError
from tests.checkpoint.corruptions import CORRUPTIONS, CULPRITS


def test_the_right_checkpoint_opens(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as opened:
        assert len(opened.shards) == 3


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_refused_in_one_line_that_names_the_culprit(checkpoint: Path, name: str) -> None:
    CORRUPTIONS[name](checkpoint)

    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(checkpoint)

    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or a control character"
    assert CULPRITS[name] in message
    assert len(message) < 5000


@pytest.mark.parametrize(
    "name", ["shards_swapped", "shard_stray", "tensor_in_two_shards", "tensor_not_in_index"]
)
def test_control_these_pass_where_index_and_headers_are_not_compared(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Checkpoint, "_check_agreement", lambda _: None)
    CORRUPTIONS[name](checkpoint)

    Checkpoint(checkpoint).close()
