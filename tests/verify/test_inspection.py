"""Counts against known truth: the released models, and arithmetic done here from the dimensions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3_tools


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 as released, its data left out."""
    path = tmp_path_factory.mktemp("released") / "v3"
    dsv3_tools.sample(path, sparse=True)
    return path


def test_deepseek_v3(released: Path) -> None:
    """The figures that Hugging Face publishes for the release, and those of its technical report."""
    found = dsv3_tools.inspect(released)
    assert (found.num_tensors, found.num_shards, found.nbytes) == (91_991, 163, 688_574_839_360)
    assert {dtype: (count.num_tensors, count.nbytes) for dtype, count in found.dtypes.items()} == {
        "F8_E4M3": (45_808, 680_571_043_840),
        "BF16": (316, 2 * 3_918_786_560),
        "F32": (45_867, 4 * 41_555_600),
    }
    assert found.parameters.total == 671_026_419_200
    assert found.parameters.active == pytest.approx(37.5e9, rel=0.005)
    assert found.parameters.total + found.parameters.mtp == 684_489_845_504
    assert found.parameters.routed == 58 * 256 * 3 * 2048 * 7168
    assert (found.mtp_layers, found.mtp_tensors, found.mtp_nbytes) == ((61,), 1564, 15_424_227_552)
    assert found.odd == ()
    assert not found.written_by_dsv3
    assert found.nbytes_on_disk > found.nbytes


def test_inspecting_needs_no_torch_and_little_time(released: Path) -> None:
    """The aim is 1 s for 163 shards; the bound leaves room for a busy machine."""
    code = (
        "import sys, time, dsv3_tools\nbegan = time.perf_counter()\n"
        f"found = dsv3_tools.inspect({str(released)!r})\nseconds = time.perf_counter() - began\n"
        "assert not {'torch', 'numba'} & set(sys.modules)\nprint(seconds)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert float(done.stdout) < 8


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [("kimi-k2", 1.0265e12, 32.9e9), ("moonlight", 15.96e9, 2.9e9)],
)
def test_relatives(tmp_path: Path, preset: str, total: float, active: float) -> None:
    """Kimi-K2 is said to have 1T and 32B active parameters, Moonlight 16B and 3B."""
    dsv3_tools.sample(tmp_path / "model", preset=preset, weights="bf16", sparse=True)
    found = dsv3_tools.inspect(tmp_path / "model")
    assert found.parameters.total == pytest.approx(total, rel=0.002)
    assert found.parameters.active == pytest.approx(active, rel=0.03)
    assert (found.parameters.mtp, found.mtp_layers, found.odd) == (0, (), ())


def test_small_checkpoint_by_hand(fp8_checkpoint: Path, bf16_checkpoint: Path) -> None:
    config = json.loads((fp8_checkpoint / "config.json").read_text())
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    heads, experts = config["num_attention_heads"], config["n_routed_experts"]
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    attention = (
        (hidden * q_rank + q_rank + q_rank * heads * (nope + rope))
        + (hidden * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value))
        + heads * value * hidden
        + 2 * hidden
    )
    router, expert = experts * (hidden + 1), 3 * hidden * width
    embedding = config["vocab_size"] * hidden
    dense = attention + 3 * hidden * config["intermediate_size"]
    moe_but_routed = attention + router + expert
    total_but_routed = 2 * embedding + hidden + dense + 2 * moe_but_routed
    for checkpoint in (fp8_checkpoint, bf16_checkpoint):
        found = dsv3_tools.inspect(checkpoint).parameters
        assert found.routed == 2 * experts * expert
        assert found.total == total_but_routed + 2 * experts * expert
        assert found.active == total_but_routed + 2 * config["num_experts_per_tok"] * expert
        assert found.mtp == (
            2 * embedding + moe_but_routed + experts * expert + 2 * hidden * hidden + 3 * hidden
        )


def test_both_layouts_have_the_same_parameters(fp8_checkpoint: Path, bf16_checkpoint: Path) -> None:
    before, after = dsv3_tools.inspect(fp8_checkpoint), dsv3_tools.inspect(bf16_checkpoint)
    assert before.parameters == after.parameters
    assert before.config == after.config
    assert (before.quantization is None, after.quantization is None) == (False, True)
    assert (before.written_by_dsv3, after.written_by_dsv3) == (False, True)
    assert before.nbytes_on_disk == sum(p.stat().st_size for p in fp8_checkpoint.glob("*.safetensors"))


def test_negative_control_another_width_is_noticed(fp8_checkpoint: Path, copied) -> None:
    checkpoint = copied(fp8_checkpoint)
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"moe_intermediate_size": 64', '"moe_intermediate_size": 65'))
    assert any("config.json makes it [65, 192]" in line for line in dsv3_tools.inspect(checkpoint).odd)
