"""`dsv3 inspect` says what a checkpoint is, and everything that is odd about it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as st
import torch

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.1."


def rewrite(checkpoint: Path, edit: Callable[[dict[str, dict[str, torch.Tensor]]], None]) -> None:
    """Rewrites shards and index after an edit of the tensors by shard."""
    shards = {path.name: st.load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))}
    edit(shards)
    for shard, tensors in shards.items():
        st.save_file(tensors, checkpoint / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (checkpoint / INDEX).write_text(json.dumps(index))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def holder(shards: dict[str, dict[str, torch.Tensor]], name: str) -> dict[str, torch.Tensor]:
    return next(tensors for tensors in shards.values() if name in tensors)


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def edit(shards: dict[str, dict[str, torch.Tensor]]) -> None:
        tensors = holder(shards, name)
        made = make(tensors.pop(name))
        if made is not None:
            tensors[name] = made

    return lambda checkpoint: rewrite(checkpoint, edit)


def stale_total_size(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, lambda index: index["metadata"].update(total_size=1_369_062_772_000))


def no_total_size(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, lambda index: index.pop("metadata"))


def without_mtp(checkpoint: Path) -> None:
    def edit(shards: dict[str, dict[str, torch.Tensor]]) -> None:
        for tensors in shards.values():
            for name in [name for name in tensors if name.startswith("model.layers.3.")]:
                del tensors[name]
        norm = holder(shards, "model.norm.weight").pop("model.norm.weight")
        shards["model-00004-of-000004.safetensors"]["model.norm.weight"] = norm  # or it would be empty

    rewrite(checkpoint, edit)


def leftover_quantization(checkpoint: Path) -> None:
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_json(checkpoint / "config.json", lambda config: config.update(quantization_config=block))


def no_quantization(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.pop("quantization_config"))


def unexpected_tensor(checkpoint: Path) -> None:
    def edit(shards: dict[str, dict[str, torch.Tensor]]) -> None:
        shards["model-00001-of-000004.safetensors"]["model.vision.weight"] = torch.zeros(3)

    rewrite(checkpoint, edit)


def scale_in_another_shard(checkpoint: Path) -> None:
    def edit(shards: dict[str, dict[str, torch.Tensor]]) -> None:
        name = LAYER + "self_attn.o_proj.weight_scale_inv"
        home = holder(shards, name)
        scale = home.pop(name)
        next(tensors for tensors in shards.values() if tensors is not home)[name] = scale

    rewrite(checkpoint, edit)


def pickle_file(checkpoint: Path) -> None:
    (checkpoint / "training_args.bin").write_bytes(b"\x80\x04.")


GATE_BIAS = LAYER + "mlp.gate.e_score_correction_bias"
O_PROJ = LAYER + "self_attn.o_proj.weight"

ODD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "stale total_size": (
        "fp8",
        stale_total_size,
        r"the index says total_size 1,369,062,772,000, the tensors have [\d,]+ bytes",
    ),
    "no total_size": ("fp8", no_total_size, "the index says total_size None"),
    "missing MTP weights": (
        "fp8",
        without_mtp,
        "config.json says num_nextn_predict_layers 1, but the MTP module's weights are missing",
    ),
    "one MTP weight missing": (
        "fp8",
        replace("model.layers.3.eh_proj.weight", lambda _: None),
        r"1 of the model's tensors are missing: model\.layers\.3\.eh_proj\.weight",
    ),
    "leftover quantization_config": (
        "bf16",
        leftover_quantization,
        "no weight is quantized, but config.json has a quantization_config",
    ),
    "no quantization_config": ("fp8", no_quantization, "weights are FP8, but config.json has no"),
    "unexpected tensor": ("fp8", unexpected_tensor, r"1 tensors do not belong .*: model\.vision\.weight"),
    "BF16 router bias": (
        "fp8",
        replace(GATE_BIAS, lambda bias: bias.bfloat16()),
        f"1 router biases are not float32: routing changes; {re.escape(GATE_BIAS)}",
    ),
    "scale in another shard": (
        "fp8",
        scale_in_another_shard,
        "1 parts of weights, such as scales, are in another shard .*o_proj",
    ),
    "missing scale": (
        "fp8",
        replace(O_PROJ + "_scale_inv", lambda _: None),
        "1 quantized weights have no scale",
    ),
    "scale without weight": (
        "fp8",
        replace(O_PROJ, lambda weight: weight.to(torch.bfloat16)),
        "model.*o_proj.weight_scale_inv is there but its weight is BF16",
    ),
    "wrong shape": (
        "fp8",
        replace("model.norm.weight", lambda weight: weight[:100].clone()),
        r"model\.norm\.weight is BF16 \[100\], config\.json makes it \[192\]",
    ),
    "pickle file": ("fp8", pickle_file, r"pickle files, never opened nor copied: training_args\.bin"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_said_and_nothing_else(
    dsv3, fp8_checkpoint: Path, bf16_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    layout, damage, expected = ODD[name]
    checkpoint = tmp_path / "copy"
    shutil.copytree({"fp8": fp8_checkpoint, "bf16": bf16_checkpoint}[layout], checkpoint)
    damage(checkpoint)
    text = dsv3("inspect", checkpoint)
    document = dsv3("inspect", checkpoint, "--json").document
    (line,) = document["odd"]
    assert re.match(expected, line), line
    assert f"  odd: {line}\n" in text.out
    assert (text.code, text.err) == (0, "")


def test_negative_control_nothing_is_odd(dsv3, fp8_checkpoint: Path, bf16_checkpoint: Path) -> None:
    for checkpoint in (fp8_checkpoint, bf16_checkpoint):
        assert "odd:" not in dsv3("inspect", checkpoint).out
        assert dsv3("inspect", checkpoint, "--json").document["odd"] == []


def test_the_text_of_an_fp8_checkpoint(dsv3, fp8_checkpoint: Path) -> None:
    lines = dsv3("inspect", fp8_checkpoint).out.splitlines()
    on_disk = sum(path.stat().st_size for path in fp8_checkpoint.glob("*.safetensors"))
    assert lines[0] == f"{fp8_checkpoint}: deepseek_v3, 3 layers (1 dense), hidden size 192"
    assert lines[1] == "  experts: 8 routed, 2 per token, 1 shared"
    assert lines[4] == (
        "    weights: 11 bf16, 32 fp8_block, 1 f32; with its own embed_tokens and shared_head.head; "
        "config.json agrees"
    )
    assert lines[5] == (
        "  quantization: activation_scheme dynamic, fmt e4m3, quant_method fp8, weight_block_size [128, 128]"
    )
    assert lines[6] == "    fp8_block: 104 weights, 1,683,456 parameters in 1,684,400 bytes"
    assert lines[7].endswith(f"in 4 shards ({on_disk:,} bytes on disk)")
    assert [line.split()[0] for line in lines[8:]] == ["F8_E4M3", "BF16", "F32"]


def test_the_text_of_a_bf16_checkpoint(dsv3, bf16_checkpoint: Path) -> None:
    text = dsv3("inspect", bf16_checkpoint).out
    assert "  quantization: none\n" in text
    assert f"dsv3 verify integrity {bf16_checkpoint}\n" in text
    assert "F8_E4M3" not in text


def test_without_mtp(dsv3, fp8_checkpoint: Path, copied) -> None:
    checkpoint = copied(fp8_checkpoint)
    without_mtp(checkpoint)
    edit_json(checkpoint / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    outcome = dsv3("inspect", checkpoint)
    assert "  MTP module: none\n" in outcome.out
    assert "odd:" not in outcome.out


def test_one_file_without_an_index(dsv3, fp8_checkpoint: Path, copied) -> None:
    checkpoint = copied(fp8_checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= st.load_file(path)
        path.unlink()
    st.save_file(tensors, checkpoint / "model.safetensors")
    (checkpoint / INDEX).unlink()
    outcome = dsv3("inspect", checkpoint)
    assert (outcome.code, "in 1 shards" in outcome.out, "odd:" in outcome.out) == (0, True, False)
