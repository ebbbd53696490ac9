"""What `config.json` says, in either spelling, and what is refused."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.errors import CheckpointError
from dsv3_tools.model.rope import frequencies, softmax_scale
from dsv3_tools.model.settings import Settings, Yarn

V3 = PRESETS["deepseek-v3"]


@pytest.mark.parametrize("name", PRESETS)
def test_released_models(name: str) -> None:
    found = Settings.from_json(PRESETS[name])
    for key in ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "norm_topk_prob"):
        assert getattr(found, key) == PRESETS[name][key]
    assert (found.yarn is None) == (name == "moonlight")
    assert found.uses_bias
    assert found.rope_interleave


def test_yarn_in_both_spellings() -> None:
    old = Settings.from_json(V3)
    new = V3 | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", **V3["rope_scaling"]}}
    del new["rope_scaling"], new["rope_theta"]
    assert asdict(Settings.from_json(new)) == asdict(old)
    assert old.yarn == Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert softmax_scale(old) == pytest.approx(192**-0.5 * 1.3688879454**2)  # 0.1 ln 40 + 1
    without = V3["rope_scaling"] | {"factor": None}
    assert Settings.from_json(V3 | {"rope_scaling": without}).yarn == old.yarn  # 163840 / 4096


def test_frequencies_of_v3() -> None:
    """Pairs 0 to 10 as without YaRN, from 23 on 40 times slower: 10.5 and 22.5 turn 32 times and once."""
    found, plain = frequencies(Settings.from_json(V3)), 10000.0 ** (-torch.arange(32) / 32)
    assert torch.allclose(found[:11], plain[:11])
    assert torch.allclose(found[23:], plain[23:] / 40)
    assert (found[11:23] < plain[11:23]).all()
    assert (found[11:23] > plain[11:23] / 40).all()
    assert torch.allclose(frequencies(Settings.from_json(V3 | {"rope_scaling": None})), plain)


def test_greedy_routing_has_no_bias() -> None:
    ungrouped = V3 | {"n_group": 1, "topk_group": 1}
    assert not Settings.from_json(ungrouped | {"topk_method": "greedy"}).uses_bias
    assert Settings.from_json({k: v for k, v in ungrouped.items() if k != "topk_method"}).uses_bias


YARN = V3["rope_scaling"]
REFUSED = {
    "scoring_func is 'softmax'": {"scoring_func": "softmax"},
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "attention_bias is 'True'": {"attention_bias": True},
    "topk_method is 'greedy' with n_group 8": {"topk_method": "greedy"},
    "topk_method is 'group_limited_greedy'": {"topk_method": "group_limited_greedy"},
    "sparse attention with an indexer": {"model_type": "deepseek_v32"},
    "'deepseek_v3' has sparse attention": {"index_n_heads": 64, "index_head_dim": 128},
    "num_key_value_heads is '8'": {"num_key_value_heads": 8},
    "qk_rope_head_dim is 63": {"qk_rope_head_dim": 63},
    "n_group 7 and topk_group 4 do not fit": {"n_group": 7},
    "n_group 2 and topk_group 4 do not fit": {"n_group": 2},
    "leaves 1 experts to choose from": {"n_group": 256, "topk_group": 1},
    "rope scaling is 'linear'": {"rope_scaling": {"type": "linear", "factor": 2}},
    "rope scaling has attention_factor": {"rope_scaling": YARN | {"attention_factor": 1.1}},
    "rope_scaling is str, expected an object": {"rope_scaling": "yarn"},
    "factor is -1, expected a positive number": {"rope_scaling": YARN | {"factor": -1}},
    "original_max_position_embeddings is missing": {"rope_scaling": {"type": "yarn", "factor": 40}},
    "rms_norm_eps is missing": {"rms_norm_eps": None},
    "rms_norm_eps is nan": {"rms_norm_eps": float("nan")},
    "rope_theta is 0,": {"rope_theta": 0},
    "routed_scaling_factor is True": {"routed_scaling_factor": True},
    "norm_topk_prob is missing": {"norm_topk_prob": None},
    "rope_interleave is 1,": {"rope_interleave": 1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^x/config.json: .*{message}"):
        Settings.from_json(V3 | REFUSED[message], "x/config.json")
