"""The forward pass on layers of DeepSeek-V3's shapes, against what the machine could do at best.

    python benchmarks/forward.py                                        one H200, FP8 in /dev/shm
    python benchmarks/forward.py --device cuda:0 --device cuda:0,1      one GPU, then two
    python benchmarks/forward.py --weights bf16 --layers 2
    python benchmarks/forward.py --device cpu --small

The weights are a random sample of MoE layers; tokens go to random experts, evenly (a random router would
send nearly all of them to the same few). A layer's best time is the larger of two:

- reading its bytes: the same files in blocks of 16 MiB, by as many threads, into pinned memory and on to
  the device, nothing decoded (on the CPU: into a buffer that is reused);
- 2 x active parameters x tokens at half the rate of a BF16 matrix product that is measured here.

Times are for all layers, from the first read on, and so include filling the pipeline. Every set of devices
runs in processes of its own; the first round, which compiles kernels, does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import dsv3_tools
from dsv3_tools import Checkpoint
from dsv3_tools.model.cores import reading_threads
from dsv3_tools.model.launch import run_ranks
from dsv3_tools.model.moe import Routes
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.model.settings import Settings
from dsv3_tools.model.transformer import Transformer

BLOCK_NBYTES = 16 << 20
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
}


def main() -> None:
    arguments = parse_arguments()
    folder = Path(arguments.folder) / "dsv3-bench-forward"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        # No MTP, no dense layer, and a vocabulary that takes no room: the layers are what is measured.
        overrides = {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "vocab_size": 1024}
        overrides |= SMALL if arguments.small else {}
        made = dsv3_tools.sample(
            folder / "model",
            weights=arguments.weights,
            layers=arguments.layers,
            experts=arguments.experts,
            overrides=overrides,
        )
        print(f"{arguments.layers} layers of {arguments.experts} experts, {made.nbytes / 1e9:.2f} GB")
        results = [measure(arguments, device) for device in arguments.device]
    finally:
        shutil.rmtree(folder)
    report(arguments, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", action="append", help='"cpu", "cuda:0" or "cuda:0,1"; may be repeated')
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--weights", default="fp8", help="as of dsv3 sample")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", default="BF16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--small", action="store_true", help="small layers and few tokens")
    arguments = parser.parse_args()
    arguments.device = arguments.device or ["cuda:0"]
    if arguments.small:
        arguments.experts, arguments.sequences, arguments.length = 32, 2, 128
    return arguments


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Returns the figures of one set of devices."""
    kind, _, numbers = device.partition(":")
    devices = [f"{kind}:{n}" for n in numbers.split(",")] if numbers else [device]
    result: dict[str, Any] = run_ranks(work, devices, vars(arguments))
    return {"device": device, **result}


def work(ranks: RankGroup, device: str, _report: object, options: dict[str, Any]) -> dict[str, Any]:
    """Runs in every rank."""
    directory = Path(options["folder"]) / "dsv3-bench-forward" / "model"
    threads = options["threads"] or reading_threads(torch.device(device).type, ranks.world_size)
    passes, reads, peaks = [], [], []
    with Checkpoint(directory) as checkpoint:
        model = Transformer(
            checkpoint,
            device=device,
            dtype=options["dtype"],
            ranks=ranks,
            threads=threads,
            budget=options["budget"],
        )
        generator = torch.Generator().manual_seed(0)
        shape = (options["sequences"], options["length"])
        tokens = torch.randint(1024, shape, generator=generator)
        routes = random_routes(model.settings, tokens.numel(), generator, model.device)
        for _ in range(1 + options["rounds"]):
            passes.append(run_layers(model, tokens, routes))
            if model.device.type == "cuda":
                peaks.append(torch.cuda.max_memory_allocated(model.device))
            reads.append(read_all(checkpoint, ranks, model.device, threads))
        rate = matmul_rate(model.device, model.dtype)
    return {
        "layers": model.settings.dims.num_hidden_layers,
        "pass_s": passes[1:],
        "read_s": reads[1:],
        "compute_s": flops(model.settings, tokens.numel()) / (0.5 * rate) / ranks.world_size,
        "rate": rate,
        "peak_nbytes": max(peaks, default=0),
        "name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU",
    }


def run_layers(model: Transformer, tokens: torch.Tensor, routes: Routes) -> float:
    """Returns the seconds of one pass through all layers; the router chooses, too, but isn't followed."""
    hidden = model.embed(tokens)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    synchronize(model)
    began = time.perf_counter()
    for _, layer in model.layers():
        hidden = layer.attention(hidden)
        layer.route(hidden)
        hidden, _ = layer.mlp(hidden, routes=routes)
    synchronize(model)
    return time.perf_counter() - began


def synchronize(model: Transformer) -> None:
    """Waits for this device and for the other ranks."""
    one = torch.ones(1, device=model.device)
    assert model.ranks.sum_(one).item() == model.ranks.world_size


def random_routes(
    settings: Settings, num_tokens: int, generator: torch.Generator, device: torch.device
) -> Routes:
    dims = settings.dims
    scores = torch.rand((num_tokens, dims.n_routed_experts), generator=generator)
    indices = scores.topk(dims.num_experts_per_tok, dim=1).indices
    return Routes(indices.to(device), torch.full(indices.shape, 0.25).to(device))


def flops(settings: Settings, num_tokens: int) -> float:
    """Returns 2 x the parameters that a token uses x tokens, of all layers; attention scores don't count."""
    d = settings.dims
    assert d.q_lora_rank is not None
    query = d.q_lora_rank * (d.hidden_size + d.num_attention_heads * d.qk_head_dim)
    key = d.hidden_size * (d.kv_lora_rank + d.qk_rope_head_dim)
    key += d.kv_lora_rank * d.num_attention_heads * (d.qk_nope_head_dim + d.v_head_dim)
    out = d.hidden_size * d.num_attention_heads * d.v_head_dim
    experts = 3 * d.hidden_size * d.moe_intermediate_size * (d.num_experts_per_tok + d.n_shared_experts)
    router = d.hidden_size * d.n_routed_experts
    return 2.0 * num_tokens * d.num_hidden_layers * (query + key + out + experts + router)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns operations a second of a large square product."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        product = one @ other
        product[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[2:])


def read_all(checkpoint: Checkpoint, ranks: RankGroup, device: torch.device, threads: int) -> float:
    """Returns the seconds for this rank's share of all bytes, in large blocks."""
    blocks = [
        (shard.path, start, min(BLOCK_NBYTES, shard.nbytes - start))
        for shard in checkpoint.shards.values()
        for start in range(0, shard.nbytes, BLOCK_NBYTES)
    ]
    mine = [blocks[n] for n in ranks.share(len(blocks))]
    ranks.sum_(torch.ones(1, device=device)).item()
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda n: read_blocks(mine[n::threads], device), range(threads)))
    return time.perf_counter() - began


def read_blocks(blocks: list[tuple[Path, int, int]], device: torch.device) -> None:
    cuda = device.type == "cuda"
    slabs = [torch.empty(BLOCK_NBYTES, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
    stream = torch.cuda.Stream(device) if cuda else None
    copied = [torch.cuda.Event(blocking=True) if cuda else None for _ in slabs]
    target = torch.empty(BLOCK_NBYTES, dtype=torch.uint8, device=device) if cuda else None
    for n, (path, start, count) in enumerate(blocks):
        slab, event = slabs[n % 2], copied[n % 2]
        if event is not None:
            event.synchronize()
        descriptor = os.open(path, os.O_RDONLY)
        os.preadv(descriptor, [slab.numpy()[:count]], start)
        os.close(descriptor)
        if target is not None and event is not None:
            with torch.cuda.stream(stream):
                target[:count].copy_(slab[:count], non_blocking=True)
                event.record(stream)
    if stream is not None:
        stream.synchronize()


def report(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    num_tokens = arguments.sequences * arguments.length
    print(f"{arguments.weights}, computed in {arguments.dtype}, {num_tokens} tokens; per layer, medians:\n")
    print("| device | ms | best: read | best: compute | over the best | peak GPU memory | faster |")
    print("|---|---|---|---|---|---|---|")
    first = None
    for r in results:
        per = 1e3 / r["layers"]
        whole, read = (statistics.median(r[key]) * per for key in ("pass_s", "read_s"))
        compute = r["compute_s"] * per
        ratios = [
            seconds * per / max(reading * per, compute)
            for seconds, reading in zip(r["pass_s"], r["read_s"], strict=True)
        ]
        first = first or whole
        print(
            f"| {r['device']} ({r['name']}) | {whole:.1f} | {read:.1f} | {compute:.1f} "
            f"| {statistics.median(ratios):.2f} | {r['peak_nbytes'] / 1e9:.1f} GB | {first / whole:.2f} |"
        )
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
