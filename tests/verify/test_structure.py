"""`verify structure` finds what is wrong with a checkpoint by itself, in its headers and in its data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as st
import torch

import dsv3_tools
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.errors import CheckpointError, Interrupted

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.1."
O_PROJ = LAYER + "self_attn.o_proj."
Tensors = dict[str, torch.Tensor]


def edit(checkpoint: Path, change: Callable[[Tensors], Any]) -> None:
    """Writes a checkpoint again, as one shard, after a change of its tensors."""
    tensors: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= st.load_file(path)
        path.unlink()
    change(tensors)
    st.save_file(tensors, checkpoint / "model-00001-of-000001.safetensors", metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = dict.fromkeys(tensors, "model-00001-of-000001.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def configure(checkpoint: Path, **changes: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def integers(fp8_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small checkpoint in INT8 and in two layouts of INT4; must not be written to."""
    folder = tmp_path_factory.mktemp("integers")
    dsv3_tools.quantize_int8(fp8_checkpoint, folder / "int8", device="cpu")
    for layout in ("compressed-tensors", "gptq"):
        dsv3_tools.quantize_int4(fp8_checkpoint, folder / layout, layout=layout, group_size=32, device="cpu")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("data", [True, False])
def test_sound_checkpoints(
    fp8_checkpoint: Path, bf16_checkpoint: Path, integers: dict[str, Path], data: bool
) -> None:
    for checkpoint in (fp8_checkpoint, bf16_checkpoint, *integers.values()):
        report = dsv3_tools.verify_structure(checkpoint, data=data)
        assert report.problems == ()
        assert report.passed
        assert report.data == data
        assert (report.nbytes > 0) == data
        assert report.notes == ()


def test_the_shipped_model_has_copies_of_embedding_and_head(miniature: Path) -> None:
    report = dsv3_tools.verify_structure(miniature)
    assert report.passed
    assert not any("differs from" in note for note in report.notes)


CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a tensor is missing": (
        lambda tensors: tensors.pop(LAYER + "input_layernorm.weight"),
        "1 of the model's tensors are missing: model.layers.1.input_layernorm.weight",
    ),
    "a stranger": (
        lambda tensors: tensors.update(x=torch.zeros(2)),
        "1 tensors do not belong to the model: x",
    ),
    "another shape": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
        "model.norm.weight is F32 [3], config.json makes it [192]",
    ),
    "a rounded router bias": (
        lambda tensors: tensors.update(
            {LAYER + "mlp.gate.e_score_correction_bias": torch.ones(8).bfloat16()}
        ),
        "1 router biases are not float32",
    ),
    "no scale": (
        lambda tensors: tensors.pop(O_PROJ + "weight_scale_inv"),
        "1 quantized weights have no scale or lack another part",
    ),
    "a scale of another shape": (
        lambda tensors: tensors.update({O_PROJ + "weight_scale_inv": torch.ones(2, 2) / 1000}),
        "o_proj.weight_scale_inv is F32 [2, 2], expected F32 [2, 1]",
    ),
    "an orphan scale": (
        lambda tensors: tensors.pop(O_PROJ + "weight"),
        "weight_scale_inv is there but its weight is missing",
    ),
    "no MTP module": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.3." in name],
        "config.json says num_nextn_predict_layers 1, but the MTP module's weights are missing",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_headers(fp8_checkpoint: Path, copied, name: str) -> None:
    checkpoint = copied(fp8_checkpoint)
    change, said = CHANGES[name]
    edit(checkpoint, change)
    for data in (False, True):
        report = dsv3_tools.verify_structure(checkpoint, data=data)
        assert not report.passed
        assert any(said in problem for problem in report.problems), report.problems
        assert all(problem.isprintable() for problem in report.problems)


def first_element(name: str, value: float) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[1] = value

    return change


def nan_code(tensors: Tensors) -> None:
    tensors[O_PROJ + "weight"].view(torch.uint8)[2, 3] = 0xFF
    tensors[O_PROJ + "weight"].view(torch.uint8)[9, 3] = 0x7F


DATA: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "NaN in a norm": (
        "fp8",
        first_element("model.norm.weight", float("nan")),
        "model.norm.weight: 1 elements are NaN or infinite, the first at [1]",
    ),
    "infinity in BF16": (
        "bf16",
        first_element("lm_head.weight", float("-inf")),
        "lm_head.weight: 1 elements are NaN or infinite, the first at [0, 1]",
    ),
    "NaN codes": ("fp8", nan_code, "o_proj.weight: 2 elements are NaN or infinite, the first at [2, 3]"),
    "a scale of 0": (
        "fp8",
        first_element(O_PROJ + "weight_scale_inv", 0.0),
        "o_proj.weight_scale_inv: the scale at [1, 0] is 0.0",
    ),
    "a negative scale": (
        "int8",
        first_element(O_PROJ + "weight_scale", -1.0),
        "o_proj.weight_scale: the scale at [1, 0] is -1.0",
    ),
    "reciprocal scales": (
        "fp8",
        lambda tensors: tensors.update(
            {O_PROJ + "weight_scale_inv": 1 / tensors[O_PROJ + "weight_scale_inv"]}
        ),
        "are its scales reciprocals",
    ),
    "another shape said": (
        "compressed-tensors",
        first_element(LAYER + "mlp.experts.0.up_proj.weight_shape", 7),
        "up_proj.weight_shape: does not hold what belongs to",
    ),
    "another order said": (
        "gptq",
        first_element(LAYER + "mlp.experts.0.up_proj.g_idx", 1),
        "up_proj.g_idx: does not hold what belongs to",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data(fp8_checkpoint: Path, bf16_checkpoint: Path, integers, copied, name: str) -> None:
    which, change, said = DATA[name]
    checkpoint = copied({"fp8": fp8_checkpoint, "bf16": bf16_checkpoint, **integers}[which])
    edit(checkpoint, change)
    report = dsv3_tools.verify_structure(checkpoint)
    (problem,) = report.problems
    assert said in problem
    assert dsv3_tools.verify_structure(checkpoint, data=False).passed


def test_the_first_of_several_chunks(fp8_checkpoint: Path, copied, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3_tools.verify import structure

    monkeypatch.setattr(structure, "_CHUNK_NBYTES", 64)
    checkpoint = copied(fp8_checkpoint)
    edit(checkpoint, lambda tensors: tensors["model.norm.weight"].view(-1)[100::50].fill_(np.nan))
    (problem,) = dsv3_tools.verify_structure(checkpoint).problems
    assert problem == "model.norm.weight: 2 elements are NaN or infinite, the first at [100]"


def test_an_mtp_module_that_config_does_not_know(fp8_checkpoint: Path, copied) -> None:
    checkpoint = copied(fp8_checkpoint)
    configure(checkpoint, num_nextn_predict_layers=0)
    assert "tensors do not belong to the model" in dsv3_tools.verify_structure(checkpoint).problems[0]


def test_a_leftover_quantization_config(bf16_checkpoint: Path, copied) -> None:
    checkpoint = copied(bf16_checkpoint)
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    configure(checkpoint, quantization_config=block)
    assert "no weight is quantized" in dsv3_tools.verify_structure(checkpoint).problems[0]
    configure(checkpoint, quantization_config={"quant_method": "bitsandbytes"})
    assert "quantization is 'bitsandbytes'" in dsv3_tools.verify_structure(checkpoint).problems[0]


def test_a_total_size_that_is_not_is_a_note(fp8_checkpoint: Path, copied) -> None:
    """The release itself states another one."""
    checkpoint = copied(fp8_checkpoint)
    index = json.loads((checkpoint / INDEX).read_text())
    (checkpoint / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": 3}}))
    report = dsv3_tools.verify_structure(checkpoint)
    assert report.passed
    assert report.notes[0].startswith("the index says total_size 3, the tensors have ")


def test_files_that_do_not_agree_are_a_finding(fp8_checkpoint: Path, copied) -> None:
    checkpoint = copied(fp8_checkpoint)
    (checkpoint / "model-00002-of-000004.safetensors").unlink()
    report = dsv3_tools.verify_structure(checkpoint)
    assert "model-00002-of-000004.safetensors" in report.problems[0]
    with pytest.raises(CheckpointError):
        dsv3_tools.verify_structure(checkpoint / "nothing")


def test_workers_progress_and_stop(fp8_checkpoint: Path) -> None:
    seen: list[Progress] = []
    report = dsv3_tools.verify_structure(fp8_checkpoint, workers=1, on_progress=seen.append)
    assert report == dsv3_tools.verify_structure(fp8_checkpoint, workers=4)
    assert seen[-1].nbytes_total == report.nbytes >= seen[-1].nbytes_done > 0.9 * report.nbytes
    stop = Stop()
    with pytest.raises(Interrupted) as caught:
        dsv3_tools.verify_structure(fp8_checkpoint, stop=stop, on_progress=lambda _: stop.set(2))
    assert caught.value.exit_code == 130
