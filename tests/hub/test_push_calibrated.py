"""A calibrated run that uploads its shards as they are made, stopped and gone on with, with nothing kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsv3_tools
from dsv3_tools.conversion.making import Made, Place
from dsv3_tools.conversion.plan import ShardPlan
from dsv3_tools.quantize import calibrator
from tests.hub.server import TOKEN, FakeHub
from tests.quantize.conftest import TINY


@pytest.fixture(autouse=True)
def _logged_in(client: None, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.organizations.add("team")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stopped(Exception):
    """Ends a run where it stands."""


@pytest.mark.parametrize("save_every", [1, 99])
def test_stopped_and_gone_on_with(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    """Layers whose shards have gone are quantized again if hidden states begin before them."""
    dsv3_tools.sample(tmp_path / "source", overrides=TINY, shards=2, seed=5)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 160, (12, 40)))

    def quantize(out: Path, **more: Any) -> Any:
        return dsv3_tools.quantize_int4(
            tmp_path / "source",
            out,
            method="gptq",
            calibration=tmp_path / "tokens.npy",
            device="cpu",
            group_size=32,
            save_every=save_every,
            **more,
        )

    quantize(tmp_path / "here")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    make = calibrator.Calibrator.make

    def stopped(self: Any, missing: Sequence[ShardPlan], place: Place) -> Iterator[Made]:
        with closing(make(self, missing, place)) as batches:
            for count, batch in enumerate(batches, start=1):
                yield batch
                if count == 4:
                    raise Stopped

    push = {"push": "team/result", "keep_output": False}
    with monkeypatch.context() as patch:
        patch.setattr(calibrator.Calibrator, "make", stopped)
        with pytest.raises(Stopped):
            quantize(tmp_path / "out", **push)
    result = quantize(tmp_path / "out", **push)
    assert result.pushed
    found = hub.repo("team/result").tree("main")
    assert {name: found[name] for name in found if name != ".gitattributes"} == expected
    assert not list((tmp_path / "out").glob("*.safetensors"))
