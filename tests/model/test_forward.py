"""What holds between runs of the same model: formats, batches, replayed routing, memory, errors."""

from __future__ import annotations

import json
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dsv3_tools
from dsv3_tools import Checkpoint
from dsv3_tools.errors import CheckpointError, FormatError, UsageError
from dsv3_tools.model.moe import Routes
from dsv3_tools.model.transformer import Transformer
from dsv3_tools.model.weights import Encoded, WeightSource
from tests.model.models import bound, distance, make, ours, run, run_both, some_tokens


@pytest.fixture(scope="module")
def tokens(miniature: Path) -> torch.Tensor:
    return load_file(miniature.with_name("heldout_tokens.safetensors"))["tokens"].long()[:1, :32]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("forward") / "model")


STORED = {
    "fp8": None,
    "int8 block": lambda source, out: dsv3_tools.quantize_int8(source, out, scheme="block", device="cpu"),
    "int8 channel": lambda source, out: dsv3_tools.quantize_int8(source, out, scheme="channel", device="cpu"),
    "int4": lambda source, out: dsv3_tools.quantize_int4(source, out, device="cpu"),
}


@pytest.mark.parametrize("name", STORED)
def test_a_format_computes_what_its_bf16_weights_do(
    name: str, miniature: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Bit for bit in BF16, MTP too: decoding to BF16 is what converting does."""
    source = miniature
    if (quantize := STORED[name]) is not None:
        source = tmp_path / "quantized"
        quantize(miniature, source)
    convert = {"fp8": dsv3_tools.convert_fp8_to_bf16, "int4": dsv3_tools.convert_int4_to_bf16}
    convert.get(name, dsv3_tools.convert_int8_to_bf16)(source, tmp_path / "bf16", device="cpu")
    found = []
    for directory in (source, tmp_path / "bf16", miniature):
        with Checkpoint(directory) as checkpoint:
            found.append(run_both(Transformer(checkpoint, dtype="BF16"), tokens))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (quantize is None)


def test_sequences_do_not_see_each_other(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens(5, 40)
    allowed = bound(random_model, tokens)
    together = ours(random_model, tokens)
    alone = torch.cat([ours(random_model, row.unsqueeze(0)) for row in tokens])
    assert distance(together, alone) <= allowed
    monkeypatch.setattr("dsv3_tools.model.layer.TOKENS_AT_ONCE", 64)
    in_chunks = ours(random_model, tokens)
    assert distance(together, in_chunks) <= allowed


def test_tokens_see_only_what_is_before_them(random_model: Path) -> None:
    tokens = some_tokens(1, 40)
    other = tokens.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 200
    first, second = ours(random_model, tokens), ours(random_model, other)
    allowed = bound(random_model, tokens)
    assert distance(first[:, :30], second[:, :30]) <= allowed
    assert distance(first[:, 30:], second[:, 30:]) > 0.1


def passes(model: Transformer, tokens: torch.Tensor, replayed: list[Routes | None] | None = None):
    """Returns hidden states and the routes of all layers."""
    hidden, taken = model.embed(tokens), []
    for number, layer in model.layers():
        hidden, routes = layer.forward(hidden, routes=replayed[number] if replayed else None)
        taken.append(routes)
    return hidden, taken


def test_replayed_routes(random_model: Path, tmp_path: Path) -> None:
    tokens = some_tokens()
    other = make(tmp_path / "other", seed=9)
    with Checkpoint(random_model) as one, Checkpoint(other) as two:
        model = Transformer(one)
        hidden, routes = passes(model, tokens)
        assert [r is None for r in routes] == [True, False, False]
        again, taken = passes(model, tokens, routes)
        assert torch.equal(hidden, again)
        assert all(torch.equal(a.indices, b.indices) for a, b in zip(routes[1:], taken[1:], strict=True))
        foreign, _ = passes(model, tokens, passes(Transformer(two), tokens)[1])
        assert not torch.allclose(foreign, hidden, atol=0.1)
        # All the weight on one expert: nothing else of the routed experts is left.
        sure = [r and Routes(r.indices[:, :1], torch.ones_like(r.weights[:, :1])) for r in routes]
        padded = [r and Routes(r.indices, torch.eye(4)[0].expand_as(r.weights)) for r in routes]
        assert torch.allclose(passes(model, tokens, sure)[0], passes(model, tokens, padded)[0], atol=1e-4)


def test_weights_of_routes_are_normalised_and_scaled(random_model: Path) -> None:
    with Checkpoint(random_model) as checkpoint:
        _, routes = passes(Transformer(checkpoint), some_tokens())
    for found in routes[1:]:
        assert found.weights.dtype == torch.float32
        assert torch.allclose(found.weights.sum(1), torch.tensor(2.5))
        groups = (found.indices // 4).sort(1).values
        assert all(len(set(row)) <= 2 for row in groups.tolist())
        assert all(len(set(row)) == 4 for row in found.indices.tolist())


def test_several_batches_in_one_pass(random_model: Path) -> None:
    """Free and replayed, or long inputs in parts: the same as one after the other."""
    first, second = some_tokens(2, 30), some_tokens(1, 50, seed=5)
    with Checkpoint(random_model) as checkpoint:
        model = Transformer(checkpoint)
        expected = [passes(model, tokens)[0] for tokens in (first, second)]
        hiddens = [model.embed(tokens) for tokens in (first, second)]
        for _, layer in model.layers():
            hiddens, _ = layer.forward_all(hiddens)
        assert all(torch.equal(a, b) for a, b in zip(hiddens, expected, strict=True))
        # The steps of a layer by themselves, and a second pass over the same layer.
        hiddens = [model.embed(tokens) for tokens in (first, second)]
        for _, layer in model.layers():
            after = [layer.attention(hidden) for hidden in hiddens]
            hiddens = []
            for hidden in after:
                routes = layer.route(hidden) if layer.is_moe else None
                hiddens.append(layer.mlp(hidden, routes=routes)[0])
        assert all(torch.equal(a, b) for a, b in zip(hiddens, expected, strict=True))


def test_part_of_the_layers_and_some_skipped(random_model: Path) -> None:
    tokens = some_tokens(1, 20)
    with Checkpoint(random_model) as checkpoint:
        model = Transformer(checkpoint, budget=1, threads=1)
        hidden = model.embed(tokens)
        outputs = []
        for _, layer in model.layers():
            hidden, _ = layer.forward(hidden)
            outputs.append(hidden)
        (found,) = [layer.forward(outputs[1])[0] for _, layer in model.layers(first=2)]
        assert torch.equal(found, outputs[2])
        for number, layer in model.layers():  # only the last one is used
            if number == 2:
                assert torch.equal(layer.forward(outputs[1])[0], outputs[2])
        for number, layer in model.layers():
            assert number == layer.number == 0
            break
    assert not [t for t in threading.enumerate() if t.name.startswith("dsv3-read")]


def test_the_logits_come_in_chunks(random_model: Path) -> None:
    with Checkpoint(random_model) as checkpoint:
        model = Transformer(checkpoint, dtype="BF16")
        hidden = model.embed(some_tokens(2, 25))
        chunks = list(model.logits(hidden, chunk=20))
        assert [tuple(part.shape) for part in chunks] == [(20, 200), (20, 200), (10, 200)]
        assert {part.dtype for part in chunks} == {torch.float32}


def test_stripes_of_embedding_and_head(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ours(random_model, some_tokens())
    monkeypatch.setattr("dsv3_tools.model.transformer._STRIPE_ROWS", 33)
    assert torch.equal(ours(random_model, some_tokens()), expected)


def test_tied_embeddings(random_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(random_model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    config = json.loads((random_model / "config.json").read_text())
    found = []
    for name in ("copied", "tied"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        found.append(ours(tmp_path / name, some_tokens()))
        weights.pop("lm_head.weight", None)
        config["tie_word_embeddings"] = True
    assert torch.equal(*found)


def test_weights_are_freed_as_the_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 12 layers, 300 MB of them used: what is there at once doesn't depend on their number.

    Counted is every decoded weight that anything still refers to, each time that one more has been decoded.
    """
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "intermediate_size": 512, "vocab_size": 512}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 64, "kv_lora_rank": 64}
    dsv3_tools.sample(tmp_path / "large", layers=12, experts=32, overrides=sizes, sparse=True)
    budget, threads, expert = 8 << 20, 2, 3 * 512 * 256 * 4
    lock, alive, peak, total = threading.Lock(), {}, 0, 0
    decode = WeightSource.decode

    def counted(self, unit):
        nonlocal peak, total
        weights = decode(self, unit)
        if isinstance(unit, Encoded):
            with lock:
                for weight in weights.values():
                    alive[total] = weight.nbytes
                    weakref.finalize(weight, alive.pop, total)
                    total += weight.nbytes
                peak = max(peak, sum(list(alive.values())))
        return weights

    monkeypatch.setattr(WeightSource, "decode", counted)
    peaks = []
    for layers in (4, 12):
        with Checkpoint(tmp_path / "large") as checkpoint:
            model = Transformer(checkpoint, budget=budget, threads=threads)
            hidden, peak = model.embed(some_tokens(1, 64)), 0
            for number, layer in model.layers():
                hidden, _ = layer.forward(hidden)
                if number + 1 == layers:
                    break
        peaks.append(peak)
        del layer
        assert not alive
    assert total > 250e6
    # What waits, what is computed with, and what the threads have decoded and not handed over.
    assert max(peaks) <= budget + (2 + threads) * expert


def test_an_error_while_reading_ahead_surfaces(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Checkpoint.read_into

    def broken(self, name, start, buffer):
        if "layers.2.mlp.experts.7" in name:
            raise CheckpointError(f"{name}: the file ended")
        read(self, name, start, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", broken)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.7.*the file ended"):
        ours(random_model, some_tokens())
    assert not [t for t in threading.enumerate() if t.name.startswith("dsv3-read")]


def test_missing_and_wrong_tensors(random_model: Path, miniature: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(random_model / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((random_model / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"1\.self_attn\.o_proj\.weight is missing; the forward"):
        ours(tmp_path, some_tokens())

    (tmp_path / "scale").mkdir()
    tensors = {n: t for path in miniature.glob("*.safetensors") for n, t in load_file(path).items()}
    name = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, tmp_path / "scale" / "model.safetensors")
    (tmp_path / "scale" / "config.json").write_text((miniature / "config.json").read_text())
    with pytest.raises(FormatError, match=r"weight_scale_inv is F32 \[1, 2\], expected F32 \[2, 2\]"):
        ours(tmp_path / "scale", some_tokens())


def test_tokens_outside_the_vocabulary(random_model: Path) -> None:
    with Checkpoint(random_model) as checkpoint:
        with pytest.raises(UsageError, match="tokens 0 to 200: expected 0 to vocab_size - 1, 199"):
            Transformer(checkpoint).embed(torch.tensor([[0, 200]]))
        with pytest.raises(UsageError, match="dtype 'F16'"):
            Transformer(checkpoint, dtype="F16")


def test_on_host_is_the_same(random_model: Path) -> None:
    with Checkpoint(random_model) as checkpoint:
        model = Transformer(checkpoint)
        assert torch.equal(
            model.embed(some_tokens(), on_host=True), model.embed(some_tokens(), on_host=False)
        )
        assert torch.equal(run(model, some_tokens()), ours(random_model, some_tokens()))


def test_the_threads_of_torch_are_as_before(random_model: Path) -> None:
    """Two passes in lockstep, the first of them ended first."""
    before = torch.get_num_threads()
    with Checkpoint(random_model) as checkpoint:
        passes = [Transformer(checkpoint).layers() for _ in range(2)]
        for layers in passes:
            next(layers)
        assert torch.get_num_threads() <= max(1, before - 1)
        for layers in passes:
            layers.close()
    assert torch.get_num_threads() == before
