"""GPTQ against llm-compressor's, weight by weight: the same weights, the same tokens, INT4 in groups of 128.

    python -m venv /tmp/llmc && /tmp/llmc/bin/pip install torch llmcompressor==0.14.0.1 numba filelock
    PYTHONPATH=. /tmp/llmc/bin/python benchmarks/gptq_llmcompressor.py

Every linear of the shipped model, with the inputs that it has in the unquantized model (float32, CPU) over
the text that comes along: 9 of 10 sequences for Hessians, the tenth, and the held-out excerpts, for errors.
    Theirs: `quantize_weight`
with its defaults (static activation order, damping 0.01) and the scales of the observer, "minmax" (its
default) and "mse". Ours: what a run does with these inputs. Errors are those of outputs, of all weights of a
kind together, in dB below the outputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian
from llmcompressor.observers import Observer
from torch import Tensor

from dsv3_tools import Checkpoint
from dsv3_tools.formats import INT4Packed
from dsv3_tools.model.mlp import activation
from dsv3_tools.model.moe import assign
from dsv3_tools.model.token_files import read_token_file
from dsv3_tools.model.tokens import read_tokens
from dsv3_tools.model.transformer import Transformer
from dsv3_tools.quantize.coding import baseline, grid_of
from dsv3_tools.quantize.gram import Gram, shrink
from dsv3_tools.quantize.matrix import factorize, quantize_matrix

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "miniature" / "checkpoint"
CPU = torch.device("cpu")
FORMAT = INT4Packed(128)


class Case(NamedTuple):
    """A weight and its inputs; `layer` are those of all the layer's tokens, for a routed expert."""

    kind: str
    weight: Tensor
    train: Tensor
    held_out: Tensor
    layer: Tensor | None = None


def main() -> None:
    """Prints a row for each kind of weight."""
    torch.set_num_threads(2)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    with torch.no_grad():
        for case in cases():
            for name, quantized in methods(case):
                difference = case.held_out @ (case.weight - quantized).t()
                sums[case.kind][name] += float(difference.double().square().sum())
            sums[case.kind]["signal"] += float((case.held_out @ case.weight.t()).double().square().sum())
    names = ["absmax", "theirs minmax", "theirs mse", "ours"]
    print("| kind | " + " | ".join(names) + " | ours against the better of theirs |")
    print("|---|" + "---|" * (len(names) + 1))
    gains = []
    for kind, found in sums.items():
        levels = [10 * math.log10(found["signal"] / found[name]) for name in names]
        gains.append(levels[3] - max(levels[1:3]))
        print(f"| {kind} | " + " | ".join(f"{level:.2f}" for level in levels) + f" | {gains[-1]:+.2f} dB |")
    print(f"mean: {sum(gains) / len(gains):+.2f} dB, least: {min(gains):+.2f} dB")


def methods(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Yields every method's quantized weight, float32."""
    plain = baseline(FORMAT)
    yield "absmax", plain.decode(plain.encode(case.weight), dtype="F32")
    for observer in ("minmax", "mse"):
        yield f"theirs {observer}", theirs(case, f"memoryless_{observer}")
    own = Gram(case.weight.shape[1], CPU)
    own.add(case.train)
    hessian = own.mean()
    if case.layer is not None:
        layer = Gram(case.weight.shape[1], CPU)
        layer.add(case.layer)
        hessian = shrink(own, layer)
    grid = grid_of(FORMAT, case.weight.shape[1])
    yield "ours", quantize_matrix(case.weight, hessian, grid, factorize(hessian, 0.01)).decode(grid)


def theirs(case: Case, observer: str) -> Tensor:
    """Returns llm-compressor's weight."""
    columns = case.weight.shape[1]
    module = torch.nn.Linear(columns, len(case.weight), bias=False)
    module.weight.data = case.weight.clone()
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=128, actorder="static"
    )
    hessian, count = accumulate_hessian(case.train, module, torch.zeros(columns, columns), torch.zeros(()))
    module.quantization_args = args
    scale, zero = observed(observer, args, module)
    scale = scale.to(torch.bfloat16).float()  # as it is stored
    weights, _, fallback = quantize_weight(
        case.weight[None].clone(), (hessian / count)[None], scale[None], zero[None], None, args
    )
    assert not bool(fallback.any())
    return weights[0].float()


def observed(name: str, args: QuantizationArgs, module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Returns the scales and zero points of an observer."""
    observer = Observer.load_from_registry(name, base_name="weight", args=args)
    observer(module.weight.data)
    found = observer.get_qparams()
    return found["scale"], found["zero_point"]


def cases() -> Iterator[Case]:
    """Yields every linear of the model with its inputs."""
    with Checkpoint(SOURCE) as checkpoint:
        model = Transformer(checkpoint, through_bf16=True)
        given = read_tokens(
            SOURCE,
            tokens=None,
            text=None,
            length=256,
            max_tokens=None,
            vocab_size=checkpoint.config.vocab_size,
        )
        held = torch.from_numpy(
            read_token_file(ROOT / "miniature" / "heldout_tokens.safetensors")[:, :256].astype("int64")
        )
        tokens = torch.cat([given.batch_BL, held])
        num_train = given.batch_BL.numel() * 9 // 10 // 256 * 256
        hidden = model.embed(tokens)
        for number, layer in model.layers():
            yield from layer_cases(model, number, hidden, num_train)
            hidden, _ = layer.forward(hidden)


def layer_cases(model: Transformer, number: int, hidden: Tensor, num_train: int) -> Iterator[Case]:
    """Yields the linears of one layer."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    prefix = f"model.layers.{number}."

    def weight(name: str) -> Tensor:
        where, fmt, parts = model.stored(prefix + name + ".weight")
        return fmt.decode({part: where.read(tensor) for part, tensor in parts.items()}, dtype="BF16").float()

    def case(kind: str, name: str, x: Tensor) -> Case:
        return Case(kind, weight(name), x[:num_train], x[num_train:])

    with model.reading([]) as weights:
        layer = model.layer(number, weights, tap=lambda name, x: inputs[name].append(x.clone()))
        middle = layer.attention(hidden)
        seen = {name: torch.cat(parts) for name, parts in inputs.items()}
        for tapped, name in (
            ("q_a_proj", "q_a_proj"),
            ("q_a_proj", "kv_a_proj_with_mqa"),
            ("q_b_proj", "q_b_proj"),
            ("kv_b_proj", "kv_b_proj"),
            ("o_proj", "o_proj"),
        ):
            yield case(f"attention: {name}", f"self_attn.{name}", seen[tapped])
        x = layer.normed(middle)
        inside = "mlp.shared_experts." if layer.is_moe else "mlp."
        kind = "shared experts" if layer.is_moe else "dense MLP"
        parts = {name: weight(inside + name) for name in ("gate_proj", "up_proj")}
        for name in parts:
            yield case(f"{kind}: {name}", inside + name, x)
        yield case(f"{kind}: down_proj", f"{inside}down_proj", activation(x, parts))
        if layer.is_moe:
            yield from expert_cases(model, layer.route(middle), x, num_train, weight)


def expert_cases(model, routes, x, num_train, weight) -> Iterator[Case]:  # type: ignore[no-untyped-def]
    """Yields the routed experts of one layer."""
    count = model.settings.dims.n_routed_experts
    assignment = assign(routes, count)
    for expert in range(count):
        tokens = assignment.tokens[assignment.of(expert)]
        train, held = x[tokens[tokens < num_train]], x[tokens[tokens >= num_train]]
        inside = f"mlp.experts.{expert}."
        parts = {name: weight(inside + name) for name in ("gate_proj", "up_proj")}
        for name, matrix in parts.items():
            yield Case(f"routed experts: {name}", matrix, train, held, x[:num_train])
        yield Case(
            "routed experts: down_proj",
            weight(f"{inside}down_proj"),
            activation(train, parts),
            activation(held, parts),
            activation(x[:num_train], parts),
        )


if __name__ == "__main__":
    main()
