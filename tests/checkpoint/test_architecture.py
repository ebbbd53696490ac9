"""Every tensor of a model from its dimensions: the release's published totals, and transformers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.formats import FP8Block

V3 = PRESETS["deepseek-v3"]

SCALE_DOWN = {
    "first_k_dense_replace": 1,
    "hidden_size": 48,
    "intermediate_size": 40,
    "kv_lora_rank": 24,
    "moe_intermediate_size": 20,
    "n_group": 1,
    "n_routed_experts": 6,
    "num_attention_heads": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "topk_group": 1,
    "v_head_dim": 14,
    "vocab_size": 72,
}


def as_released(config: dict[str, Any]) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, spec in dense_tensors(ModelConfig.from_dict(config)).items():
        parsed = parse_name(name)
        assert parsed is not None
        if parsed.is_fp8_linear and parsed.parameter == "weight":
            specs |= {f"{parsed.prefix}.{part}": s for part, s in FP8Block().parts(spec.shape).items()}
        else:
            specs[name] = spec
    return specs


def nbytes(specs: dict[str, TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def test_the_release_to_the_byte() -> None:
    """The totals that Hugging Face publishes (`safetensors.total`, file sizes)."""
    specs = as_released(V3)
    mtp = {name: spec for name, spec in specs.items() if name.startswith("model.layers.61.")}
    elements: Counter[str] = Counter()
    for spec in specs.values():
        elements[spec.dtype] += spec.num_elements

    assert Counter(s.dtype for s in specs.values()) == {"F8_E4M3": 45_808, "F32": 45_867, "BF16": 316}
    assert elements == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert (len(specs), nbytes(specs)) == (91_991, 688_574_839_360)
    assert (len(mtp), nbytes(mtp)) == (1_564, 15_424_227_552)
    assert (len(specs) - len(mtp), nbytes(specs) - nbytes(mtp)) == (90_427, 673_150_611_808)
    copies = [name for name in mtp if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))]
    assert len(mtp) - len(copies) == 1_562


def test_the_release_in_bf16() -> None:
    specs = dense_tensors(ModelConfig.from_dict(V3))
    assert len(specs) == 46_183
    assert sum(spec.num_elements for spec in specs.values()) == 684_489_845_504
    assert nbytes(specs) == 1_368_979_721_216
    assert {name for name, spec in specs.items() if spec.dtype == "F32"} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(3, 62)
    }
    main = {n: s for n, s in specs.items() if not n.startswith("model.layers.61.")}
    assert sum(spec.num_elements for spec in main.values()) == 671_026_419_200


@pytest.mark.parametrize(
    ("change", "fewer"), [({"n_routed_experts": 255}, 6 * 59), ({"num_nextn_predict_layers": 0}, 1564)]
)
def test_control_another_model_has_other_totals(change: dict[str, int], fewer: int) -> None:
    specs = as_released(V3 | change)
    assert len(specs) == 91_991 - fewer
    assert nbytes(specs) != 688_574_839_360


def test_shapes_of_the_table_in_the_release() -> None:
    specs = as_released(V3)
    layer = "model.layers.60."
    for name, shape, blocks in [
        ("self_attn.q_a_proj", (1536, 7168), (12, 56)),
        ("self_attn.q_b_proj", (24576, 1536), (192, 12)),
        ("self_attn.kv_a_proj_with_mqa", (576, 7168), (5, 56)),
        ("self_attn.kv_b_proj", (32768, 512), (256, 4)),
        ("self_attn.o_proj", (7168, 16384), (56, 128)),
        ("mlp.experts.255.up_proj", (2048, 7168), (16, 56)),
        ("mlp.shared_experts.down_proj", (7168, 2048), (56, 16)),
    ]:
        assert specs[f"{layer}{name}.weight"] == TensorSpec("F8_E4M3", shape)
        assert specs[f"{layer}{name}.weight_scale_inv"] == TensorSpec("F32", blocks)
    assert specs["model.layers.2.mlp.gate_proj.weight"] == TensorSpec("F8_E4M3", (18432, 7168))
    assert specs["model.layers.61.eh_proj.weight"] == TensorSpec("BF16", (7168, 14336))
    assert specs["model.layers.3.mlp.gate.weight"] == TensorSpec("BF16", (256, 7168))


def transformers_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of transformers' own model, its fused experts taken apart."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    own = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**own))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            shapes[name] = tuple(tensor.shape)
            continue
        for expert, weight in enumerate(tensor):
            parts = {"gate_proj": weight[: len(weight) // 2], "up_proj": weight[len(weight) // 2 :]}
            for part, piece in (parts if last == "gate_up_proj" else {"down_proj": weight}).items():
                shapes[f"{prefix}.{expert}.{part}.weight"] = tuple(piece.shape)
    return shapes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_of_transformers(preset: str) -> None:
    config = PRESETS[preset] | SCALE_DOWN
    if config["q_lora_rank"] is not None:
        config["q_lora_rank"] = 18
    expected = transformers_shapes(config)

    specs = dense_tensors(ModelConfig.from_dict(config | {"num_nextn_predict_layers": 0}))

    assert {name: spec.shape for name, spec in specs.items()} == expected
    wider = dense_tensors(ModelConfig.from_dict(config | {"num_nextn_predict_layers": 0, "v_head_dim": 15}))
    assert {name: spec.shape for name, spec in wider.items()} != expected


def test_tied_embeddings_have_no_head_and_the_order_is_the_models() -> None:
    names = list(dense_tensors(ModelConfig.from_dict(V3 | SCALE_DOWN | {"q_lora_rank": 18})))
    tied = list(dense_tensors(ModelConfig.from_dict(V3 | SCALE_DOWN | {"tie_word_embeddings": True})))
    assert names[0] == "model.embed_tokens.weight"
    assert names.index("lm_head.weight") == names.index("model.norm.weight") + 1
    assert names.index("lm_head.weight") < names.index("model.layers.3.embed_tokens.weight")
    assert [name for name in names if name != "lm_head.weight"] == tied


def test_the_indexer_of_v32() -> None:
    config = V3 | {
        "model_type": "deepseek_v32",
        "num_hidden_layers": 4,
        "index_n_heads": 64,
        "index_head_dim": 128,
    }
    specs = dense_tensors(ModelConfig.from_dict(config))
    prefix = "model.layers.4.self_attn.indexer."
    assert {
        name.removeprefix(prefix): spec.shape for name, spec in specs.items() if name.startswith(prefix)
    } == {
        "wq_b.weight": (64 * 128, 1536),
        "wk.weight": (128, 7168),
        "k_norm.weight": (128,),
        "k_norm.bias": (128,),
        "weights_proj.weight": (64, 7168),
    }
