"""The forward pass and the comparison of logits on a GPU, and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsv3_tools
from dsv3_tools import Checkpoint
from dsv3_tools.model.launch import run_ranks
from dsv3_tools.model.staging import SLAB_NBYTES, make_reader
from dsv3_tools.model.transformer import Transformer
from tests.model.models import MARGIN, bound, check_within, make, run_both, some_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SIZES = {"hidden_size": 256, "intermediate_size": 320, "moe_intermediate_size": 128, "n_shared_experts": 3}
SIZES |= {"q_lora_rank": 128, "kv_lora_rank": 512, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model with the head sizes of V3, in every format."""
    folder = tmp_path_factory.mktemp("models")
    plain = make(folder / "bf16", SIZES)
    dsv3_tools.convert_bf16_to_fp8(plain, folder / "fp8", device="cpu")
    dsv3_tools.convert_fp8_to_bf16(folder / "fp8", folder / "fp8-as-bf16", device="cpu")
    dsv3_tools.quantize_int8(plain, folder / "int8", scheme="block", device="cpu")
    dsv3_tools.quantize_int4(plain, folder / "int4", group_size=64, device="cpu")
    dsv3_tools.quantize_int4(plain, folder / "gptq", layout="gptq", group_size=64, device="cpu")
    return {path.name: path for path in folder.iterdir()}


NAMES = ["bf16", "fp8", "int8", "int4", "gptq"]


def logits(directory: Path, tokens: torch.Tensor, device: str, dtype: str) -> torch.Tensor:
    with Checkpoint(directory) as checkpoint:
        return run_both(Transformer(checkpoint, device=device, dtype=dtype), tokens.to(device)).cpu()


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_the_cpus_within_the_bound(models: dict[str, Path], name: str) -> None:
    tokens = some_tokens(2, 48)
    found, expected = (logits(models[name], tokens, device, "F32") for device in ("cuda", "cpu"))
    check_within(found, expected, bound(models[name], tokens, run_both))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_far_from_float32_as_the_cpus(models: dict[str, Path], name: str) -> None:
    tokens = some_tokens(4, 64)
    exact = logits(models[name], tokens, "cpu", "F32")
    errors = [
        float((logits(models[name], tokens, device, "BF16") - exact).square().mean().sqrt())
        for device in ("cuda", "cpu")
    ]
    assert errors[0] < MARGIN * errors[1]


def test_reading_in_runs(models: dict[str, Path]) -> None:
    """Tensors larger than a slab, tiny ones, and stretches of both arrive as they are stored."""
    from dsv3_tools.checkpoint.specs import TensorSpec
    from dsv3_tools.model.staging import Piece

    with Checkpoint(models["fp8"]) as checkpoint:
        device = torch.device("cuda")
        pieces = [Piece(checkpoint, name, 0, spec) for name, spec in checkpoint.specs.items()]
        name, spec = max(checkpoint.specs.items(), key=lambda item: item[1].nbytes)
        pieces.append(Piece(checkpoint, name, spec.nbytes // 2, TensorSpec("U8", (spec.nbytes // 4,))))
        for chosen in (pieces, pieces[::-1], pieces[::3]):
            loaded = make_reader(device).read(chosen)
            loaded.hand_over(torch.cuda.current_stream())
            for piece, tensor in zip(chosen, loaded.tensors, strict=True):
                stored = checkpoint.read_bytes(piece.name)[piece.start : piece.start + piece.spec.nbytes]
                assert bytes(tensor.cpu().reshape(-1).view(torch.uint8).numpy()) == stored


def test_reading_more_than_a_slab(tmp_path: Path) -> None:
    dsv3_tools.sample(tmp_path / "model", layers=1, experts=8, overrides={"num_nextn_predict_layers": 0})
    with Checkpoint(tmp_path / "model") as checkpoint:
        from dsv3_tools.model.staging import Piece

        large = [(n, s) for n, s in checkpoint.specs.items() if s.nbytes > 2 * SLAB_NBYTES]
        assert large
        pieces = [Piece(checkpoint, name, 0, spec) for name, spec in large]
        loaded = make_reader(torch.device("cuda")).read(pieces)
        loaded.hand_over(torch.cuda.current_stream())
        for piece, tensor in zip(pieces, loaded.tensors, strict=True):
            assert torch.equal(tensor.cpu(), checkpoint.read(piece.name))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_equal_models_are_equal_to_the_bit(models: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    import numpy as np

    np.save(tmp_path / "tokens.npy", some_tokens(4, 64).numpy())
    options = {"tokens": tmp_path / "tokens.npy", "device": "cuda:0", "dtype": dtype}
    report = dsv3_tools.verify_logits(models["fp8"], models["fp8-as-bf16"], **options)
    assert report.passed, report.problems
    assert report.runs["free"].max_logit_error == 0
    assert report.runs["noise_free"].max_logit_error > 0
    other = dsv3_tools.verify_logits(models["bf16"], models["int4"], **options, preset="int8")
    assert not other.passed


def work(ranks, device: str, _report, directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    with Checkpoint(directory) as checkpoint:
        return run_both(Transformer(checkpoint, device=device, ranks=ranks), tokens.to(device)).cpu()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("models")
class TestTwoGpus:
    """Two GPUs give what one gives, but for the order of sums."""

    pytestmark = two_gpus

    def test_logits(self, models: dict[str, Path], name: str) -> None:
        tokens = some_tokens(2, 48)
        found = run_ranks(work, ["cuda:0", "cuda:1"], models[name], tokens)
        alone = logits(models[name], tokens, "cuda:0", "F32")
        check_within(found, alone, bound(models[name], tokens, run_both))

    def test_comparison(self, models: dict[str, Path], name: str, tmp_path: Path) -> None:
        import numpy as np

        np.save(tmp_path / "tokens.npy", some_tokens(4, 64).numpy())
        options = {"tokens": tmp_path / "tokens.npy", "dtype": "F32", "baseline": False}
        one, two = (
            dsv3_tools.verify_logits(models["bf16"], models[name], device=device, **options)
            for device in ("cuda:0", "cuda:0,1")
        )
        assert two.devices == ("cuda:0", "cuda:1")
        assert two.passed == one.passed
        assert two.runs["replayed"].kl == pytest.approx(one.runs["replayed"].kl, rel=1e-3, abs=1e-12)
