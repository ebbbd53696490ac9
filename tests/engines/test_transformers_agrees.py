"""transformers itself, the one engine that runs on any machine, judges what its rules say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dsv3_tools.engines import verdict
from tests.engines.layouts import SMALL, Made, layout

pytestmark = pytest.mark.filterwarnings("ignore")


def written(made: Made, folder: Path) -> Path:
    """Random numbers under these names; packed shapes are what they must be."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(made.config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in made.specs.items():
        if name.endswith("weight_shape"):
            rows, words = made.specs[name.replace("_shape", "_packed")].shape
            tensors[name] = torch.tensor([rows, words * 8])
        elif spec.dtype in ("I32", "I8"):
            dtype = {"I32": torch.int32, "I8": torch.int8}[spec.dtype]
            tensors[name] = torch.randint(-128, 128, spec.shape, generator=generator).to(dtype)
        else:
            dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}[spec.dtype]
            tensors[name] = (torch.randn(spec.shape, generator=generator) * 0.02).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def no_head_on_the_list(made: Made) -> None:
    made.config["quantization_config"]["ignore"].remove("lm_head")


def no_norm(made: Made) -> None:
    del made.specs["model.norm.weight"]


def nothing(made: Made) -> None:
    pass


def no_quantization_config(made: Made) -> None:
    del made.config["quantization_config"]


ONE_LAYER = SMALL | {"num_hidden_layers": 2}
PARTIAL = ONE_LAYER | {"kv_lora_rank": 512}
"""`kv_a_proj_with_mqa` has 576 rows, as in the release."""

CASES: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "bf16": ("bf16", ONE_LAYER, nothing, "loads"),
    "int4": ("int4-g128", ONE_LAYER, nothing, "loads"),
    "a norm is missing": ("bf16", ONE_LAYER, no_norm, "misread"),
    "lm_head is not on the list": ("int4-g128", ONE_LAYER, no_head_on_the_list, "misread"),
    "INT4 without a configuration": ("int4-g128", ONE_LAYER, no_quantization_config, "misread"),
    "INT8 channels": ("int8-channel", ONE_LAYER, nothing, "refused"),
    "576 rows in FP8": ("fp8", PARTIAL, nothing, "refused"),
}


@pytest.mark.parametrize("name", CASES)
def test_transformers_does_what_is_said(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base, config, change, expected = CASES[name]
    if base == "fp8":
        pytest.importorskip("accelerate")
    made = layout(base, config)
    change(made)
    found = verdict(made.view, "transformers")
    said = found.failures[0].severity if found.failures else "loads"
    assert said == expected, found
    folder = written(made, tmp_path / "model")
    try:
        _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (ValueError, RuntimeError, NotImplementedError):
        assert expected == "refused"
        return
    assert expected == ("misread" if info["missing_keys"] else "loads"), info
