"""One MoE layer of DeepSeek-V3's real shapes through calibrated quantization: seconds, kernels, GPU memory.

    python benchmarks/gptq_layer.py                                        kernels alone, then a whole layer
    python benchmarks/gptq_layer.py --experts 64 --sequences 64            fewer experts, for a quick look
    torchrun --nproc-per-node 2 benchmarks/gptq_layer.py --no-kernels      the layer on two GPUs

The model (two layers: MLA, a router with groups, 256 routed experts and a shared one, FP8 blocks) is made of
random numbers in memory; hidden states follow from random tokens, so they spread over experts as the router
has it. What is timed is what a run does with a layer: attention and router, all experts quantized, everything
copied to where the disk is written from, and the hidden states through what was quantized. The second layer
counts. Kernels are medians of 10 calls, with a synchronisation around each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dsv3_tools.kernels import gptq
from dsv3_tools.kernels.reference_gptq import Grid
from dsv3_tools.quantize.gram import Gram, square
from dsv3_tools.quantize.matrix import compensate, factorize, quantize_matrix

GRID = Grid(15, 7.5, 128, True, torch.bfloat16)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--kernels", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--layer", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.kernels:
        kernels(args.device)
    if args.layer:
        layer(args)


def timed(call: Callable[[], object], repeats: int = 10) -> float:
    """Returns the median milliseconds of a call."""
    call()
    call()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found)


def kernels(device: str) -> None:
    """Prints milliseconds of every operation on an expert's shapes."""
    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for rows, columns, what in ((4096, 7168, "gate and up"), (7168, 2048, "down")):
        x = (normal(8192, columns) * torch.logspace(0, -2, columns, device=device)).to(torch.bfloat16)
        gram = Gram(columns, torch.device(device))
        gram.add(x)
        hessian, weight = gram.mean(), 0.02 * normal(rows, columns)
        factor = factorize(hessian, 0.01)
        assert factor is not None
        scale, zero = gptq.search_scales(weight, hessian.diagonal(), GRID)
        lines = {
            "x'x, 8192 tokens": lambda: square(x),  # noqa: B023
            "factor": lambda: factorize(hessian, 0.01),  # noqa: B023
            "scale search": lambda: gptq.search_scales(weight, hessian.diagonal(), GRID),  # noqa: B023
            "search and column loop": lambda: quantize_matrix(weight, hessian, GRID, factor),  # noqa: B023
            "column loop": lambda: compensate(weight, scale, zero, GRID, factor),  # noqa: B023
            "nearest codes": lambda: gptq.nearest_codes(weight, scale, zero, GRID),  # noqa: B023
        }
        for name, call in lines.items():
            print(f"{what} {rows} x {columns}, {name}: {timed(call):.2f} ms", flush=True)


def layer(args: argparse.Namespace) -> None:
    """Prints seconds and memory of a whole layer."""
    from dsv3_tools.conversion.making import Made, Place
    from dsv3_tools.conversion.progress import Stop
    from dsv3_tools.conversion.ranks import Ranks
    from dsv3_tools.quantize.api_int4 import open_quantize_int4
    from dsv3_tools.quantize.options import Calibrating

    ranks = Ranks.join()
    device = f"cuda:{ranks.local_rank}" if ranks.world_size > 1 else args.device
    torch.cuda.set_device(device)
    root = Path(os.environ.get("DSV3_BENCH_DIR", "/dev/shm")) / "dsv3-gptq-layer"
    if ranks.is_first:
        sample(root, args.experts)
    ranks.agree()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        ids = np.random.default_rng(0).integers(0, 1000, (args.sequences, args.length))
        np.save(tokens, ids)
        calibrating = Calibrating(
            method=args.method, data=tokens, length=args.length, device="cuda", ranks=ranks, save_every=99
        )
        with open_quantize_int4(root, calibrating=calibrating, partial=True) as (plan, _, maker):
            assert maker is not None
            if ranks.is_first:
                print(json.dumps(maker.forecast(device, ranks.world_size)), flush=True)
            own = frozenset(shard.name for shard in ranks.share(plan.shards))
            place = Place(Path(folder), Path(folder), device, ranks, Stop(), own)
            began = time.perf_counter()
            torch.cuda.reset_peak_memory_stats()
            seconds: list[float] = []
            for batch in maker.make(plan.shards, place):
                assert isinstance(batch, Made)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
                began = time.perf_counter()
            seconds.append(time.perf_counter() - began)
    if ranks.is_first:
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(json.dumps({"batches": [round(s, 2) for s in seconds], "peak GB": round(peak, 1)}))


def sample(root: Path, experts: int) -> None:
    """Makes a model of two MoE layers in FP8, if it is not there yet."""
    from dsv3_tools import sample as make

    if not (root / "model.safetensors.index.json").exists():
        overrides = {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "vocab_size": 1024}
        make(root, layers=2, experts=experts, overrides=overrides)


if __name__ == "__main__":
    main()
