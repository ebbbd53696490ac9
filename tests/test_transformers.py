"""The BF16 result is the model: transformers loads it and says the same, to the bit, as an independent
dequantization; other libraries' dequantizers agree wherever they can.

The weights are those of the shipped model: trained, with YaRN, partial blocks and scales in other shards.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools

Weights = dict[str, torch.Tensor]


def load(directory: Path) -> Weights:
    """Returns all tensors, by safetensors' own reader."""
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def decode_e4m3(code: int) -> float:
    """Decodes one code by "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


CODES = np.array([decode_e4m3(code) for code in range(256)], dtype=np.float32)  # each exact in float32


def dequantized(tensors: Weights) -> Weights:
    """Returns BF16 weights, block by block in numpy: float32 code x float32 scale, then rounded."""
    weights: Weights = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype != torch.float8_e4m3fn:
            weights[name] = tensor
            continue
        scale = tensors[name + "_scale_inv"].numpy()
        values = CODES[tensor.view(torch.uint8).numpy()]
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
                values[block] *= scale[row, column]
        weights[name] = torch.from_numpy(values).to(torch.bfloat16)
    return weights


def write(weights: Weights, directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def load_model(directory: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, dict[str, Any]]:
    from transformers import DeepseekV3ForCausalLM

    model, info = DeepseekV3ForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=dtype, experts_implementation="eager"
    )
    return model.eval(), info


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.fixture(scope="module")
def tokens(miniature: Path) -> torch.Tensor:
    return load_file(miniature.with_name("heldout_tokens.safetensors"))["tokens"].long()


@pytest.fixture(scope="module")
def converted(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers") / "bf16"
    dsv3_tools.convert_fp8_to_bf16(miniature, path, device="cpu")
    return path


@pytest.fixture(scope="module")
def expected(miniature: Path) -> Weights:
    return dequantized(load(miniature))


@pytest.fixture(scope="module")
def loaded(converted: Path) -> tuple[Any, dict[str, Any]]:
    return load_model(converted)


def test_every_weight_is_that_of_the_independent_loop(converted: Path, expected: Weights) -> None:
    found = load(converted)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


def test_the_config_says_what_the_weights_are(miniature: Path, converted: Path) -> None:
    before = json.loads((miniature / "config.json").read_text())
    after = json.loads((converted / "config.json").read_text())
    assert before.pop("quantization_config")["quant_method"] == "fp8"
    assert list(after.items()) == list(before.items())
    assert after["rope_scaling"]["type"] == "yarn"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (converted / name).read_bytes() == (miniature / name).read_bytes()


def test_negative_control_a_leftover_quantization_config_is_odd(
    miniature: Path, converted: Path, tmp_path
) -> None:
    """Engines go by the key's presence: it must be gone, and `inspect` must say so where it is not."""
    wrong = Path(shutil.copytree(converted, tmp_path / "wrong"))
    shutil.copy(miniature / "config.json", wrong / "config.json")
    assert dsv3_tools.inspect(converted).odd == ()
    (line,) = dsv3_tools.inspect(wrong).odd
    assert "no weight is quantized, but config.json has a quantization_config" in line


def test_transformers_misses_nothing(miniature: Path, loaded: tuple[Any, dict[str, Any]]) -> None:
    model, info = loaded
    layers = json.loads((miniature / "config.json").read_text())["num_hidden_layers"]
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    assert info["unexpected_keys"]
    assert all(key.startswith(f"model.layers.{layers}.") for key in info["unexpected_keys"])
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert not hasattr(model.config, "quantization_config")


def test_transformers_says_the_same_to_the_bit(
    miniature: Path,
    converted: Path,
    expected: Weights,
    loaded: tuple[Any, dict[str, Any]],
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    config = json.loads((miniature / "config.json").read_text())
    del config["quantization_config"]
    other, _ = load_model(write(expected, tmp_path / "independent", config))
    found = logits(loaded[0], tokens[:2])
    assert torch.isfinite(found).all()
    assert torch.equal(found, logits(other, tokens[:2]))

    # Negative control: one scale that is 1 % off.
    tensors = load(miniature)
    name = "model.layers.2.mlp.experts.3.down_proj.weight_scale_inv"
    tensors[name] = tensors[name] * 1.01
    wrong, _ = load_model(write(dequantized(tensors), tmp_path / "wrong", config))
    assert not torch.equal(found, logits(wrong, tokens[:2]))


def test_the_model_is_as_good_as_when_it_was_trained(
    miniature: Path, converted: Path, tokens: torch.Tensor
) -> None:
    """The loss that training measured for this FP8 checkpoint; the BF16 master's is 2e-3 lower."""
    measured = json.loads(miniature.with_name("training.json").read_text())["heldout_fp8"]["loss"]
    model, _ = load_model(converted, torch.float32)
    loss = 0.0
    for part in tokens.split(16):
        found = logits(model, part[:, :-1])
        loss += torch.nn.functional.cross_entropy(
            found.double().flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
    assert loss / tokens[:, 1:].numel() == pytest.approx(measured, abs=2e-5)


def test_compressed_tensors_dequantizes_to_the_same_bits(miniature: Path, converted: Path) -> None:
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    before, found = load(miniature), load(converted)
    dequantizer = FP8BlockDequantizer(weight_block_size=(128, 128), dtype=torch.bfloat16)
    names = [name for name in found if name + "_scale_inv" in before]
    assert len(names) > 200
    for name in names:
        parts = {part: before[part] for part in (name, name + "_scale_inv")}
        assert torch.equal(dequantizer.process(parts)[name], found[name]), name


def test_transformers_dequantizes_to_the_same_bits(miniature: Path, converted: Path) -> None:
    """Where blocks are whole; it knows no others."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    before, found = load(miniature), load(converted)
    operation = Fp8Dequantize(None)
    whole = [
        n for n in found if n + "_scale_inv" in before and all(size % 128 == 0 for size in found[n].shape)
    ]
    assert len(whole) > 100
    for name in whole:
        theirs = operation._dequantize_one(
            before[name], before[name + "_scale_inv"], output_dtype=torch.bfloat16
        )
        assert torch.equal(theirs, found[name]), name


def test_and_back(miniature: Path, converted: Path, tmp_path: Path) -> None:
    """FP8 -> BF16 -> FP8 gives every byte of trained weights back."""
    dsv3_tools.convert_bf16_to_fp8(converted, tmp_path / "fp8", like=miniature, device="cpu")
    before, after = load(miniature), load(tmp_path / "fp8")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "fp8", miniature)]
    assert configs[0] == configs[1]
