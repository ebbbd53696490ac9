"""Measures the Triton kernels against a device-to-device copy and, for FP8 to BF16, DeepSeek's kernel.

    python benchmarks/gpu_kernels.py [--json FILE]     every row of the targets, under a minute on an H200
    python benchmarks/gpu_kernels.py --only integer    INT8 and INT4 alone (or: fp8)
    python benchmarks/gpu_kernels.py --sweep           tile configurations, the best ones first
    python benchmarks/gpu_kernels.py --sweep --only integer

A ratio is (bytes in + bytes out) / time / what a large copy moves in the same run, read and written.
Random data; buffers rotate over more than the L2 cache. A time is the median of event pairs, one around
each call, while the device's queue is kept filled (`torch.cuda._sleep`), so that it holds what the
device does and not how fast Python launches. Where Python's launches are the point ("one by one"), the
queue is not filled and the time is that of the loop.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_tools.kernels import triton_integer
from dsv3_tools.kernels.triton_fp8_block import (
    DEQUANTIZE_TILING,
    QUANTIZE_TILING,
    Tiling,
    dequantize_fp8_block_into,
    quantize_fp8_block_into,
)

GATE, DOWN = (2048, 7168), (7168, 2048)
SHARD = [GATE, GATE, DOWN] * 96
NUM_TIMED = 30
ROTATION_BYTES = 400e6  # several times an H200's L2 cache


@triton.jit
def deepseek_weight_dequant_kernel(x_ptr, s_ptr, y_ptr, m, n, BLOCK_SIZE: tl.constexpr):  # noqa: N803
    """What DeepSeek-V3's `inference/kernel.py` does: a 128 x 128 block a program, one weight a launch."""
    pid_m = tl.program_id(axis=0)
    pid_n = tl.program_id(axis=1)
    offs_m = pid_m * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    offs_n = pid_n * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    offs = offs_m[:, None] * n + offs_n[None, :]
    mask = (offs_m[:, None] < m) & (offs_n[None, :] < n)
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    s = tl.load(s_ptr + pid_m * tl.cdiv(n, BLOCK_SIZE) + pid_n)
    tl.store(y_ptr + offs, x * s, mask=mask)


def deepseek_weight_dequant(x: Tensor, s: Tensor, y: Tensor) -> None:
    m, n = x.shape
    deepseek_weight_dequant_kernel[(triton.cdiv(m, 128), triton.cdiv(n, 128))](x, s, y, m, n, BLOCK_SIZE=128)


@dataclasses.dataclass
class Weights:
    """Codes, scales and BF16 weights of some shapes, in device memory."""

    codes: list[Tensor]
    scales: list[Tensor]
    weights: list[Tensor]

    @classmethod
    def random(cls, shapes: Sequence[tuple[int, int]]) -> Weights:
        codes, scales, weights = [], [], []
        for rows, columns in shapes:
            code = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device="cuda")
            code ^= ((code & 0x7F) == 0x7F).to(torch.uint8)  # no NaN, as in a released checkpoint
            codes.append(code.view(torch.float8_e4m3fn))
            blocks = (-(-rows // 128), -(-columns // 128))
            scales.append(torch.rand(blocks, device="cuda") * 2e-4 + 1e-5)
            weights.append((torch.randn(rows, columns, device="cuda") * 0.02).to(torch.bfloat16))
        return cls(codes, scales, weights)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in [*self.codes, *self.scales, *self.weights])

    def one(self, i: int) -> Weights:
        return Weights([self.codes[i]], [self.scales[i]], [self.weights[i]])

    def dequantize(self, **options: Any) -> Tensor:
        return dequantize_fp8_block_into(self.codes, self.scales, self.weights, **options)

    def quantize(self, **options: Any) -> Tensor:
        return quantize_fp8_block_into(self.weights, self.codes, self.scales, **options)

    def deepseek(self) -> None:
        for x, s, y in zip(self.codes, self.scales, self.weights, strict=True):
            deepseek_weight_dequant(x, s, y)


def median_ms(
    calls: Sequence[Callable[[], object]], *, num_timed: int = NUM_TIMED, fill: bool = True
) -> float:
    """Returns the median time of a call, taking `calls` in turn."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_timed)]
    for i, call in zip(range(num_timed), itertools.cycle(calls)):
        if fill and i % 10 == 0:
            torch.cuda._sleep(4_000_000)  # about 2 ms: Python is ten launches ahead
        events[i][0].record()
        call()
        events[i][1].record()
        if not fill:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def rotating(shape: tuple[int, int]) -> list[Weights]:
    """Returns enough weights of one shape that each call finds its own out of the cache."""
    one = 3 * shape[0] * shape[1]
    return [Weights.random([shape]) for _ in range(max(2, int(ROTATION_BYTES // one) + 1))]


def copy_bandwidth() -> float:
    """Returns bytes per second, read + written, of a 4 GB copy."""
    source = torch.randint(0, 256, (4_000_000_000,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = median_ms([lambda: target.copy_(source)])
    return 2 * source.numel() / ms * 1e3


class Report:
    """Rows of results, as a Markdown table and as JSON."""

    def __init__(self, copy: float) -> None:
        self.copy = copy
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, what: str, ms: float, nbytes: int, target: float | None = None) -> float:
        ratio = nbytes / ms * 1e3 / self.copy
        self.rows.append(
            {"name": name, "kernel": what, "us": ms * 1e3, "bytes": nbytes, "ratio": ratio, "target": target}
        )
        return ratio

    def print(self) -> None:
        print("| what | kernel | time, us | GB/s | of copy | must reach | |\n|---|---|---|---|---|---|---|")
        for r in self.rows:
            reach = "" if r["target"] is None else f"{r['target']:.2f}"
            verdict = "" if r["target"] is None else "reached" if r["ratio"] >= r["target"] else "**MISSED**"
            print(
                f"| {r['name']} | {r['kernel']} | {r['us']:.1f} | {r['ratio'] * self.copy / 1e9:.0f} "
                f"| {r['ratio']:.3f} | {reach} | {verdict} |"
            )


def measure_one(report: Report, shape: tuple[int, int], target: float) -> None:
    several = rotating(shape)
    nbytes = several[0].nbytes
    name = f"FP8 -> BF16, one {shape}"
    report.add(name, "DeepSeek's", median_ms([w.deepseek for w in several]), nbytes)
    report.add(name, "ours", median_ms([w.dequantize for w in several]), nbytes, target)
    if shape == GATE:
        name = f"FP8 -> BF16, one {shape}, mean of a row of launches"
        report.add(name, "DeepSeek's", median_ms([each(several, "deepseek")]) / len(several), nbytes)
        report.add(name, "ours", median_ms([each(several, "dequantize")]) / len(several), nbytes)
    report.add(f"BF16 -> FP8, one {shape}", "ours", median_ms([w.quantize for w in several]), nbytes)


def each(several: Sequence[Weights], method: str) -> Callable[[], None]:
    """Returns a call that does one after the other."""

    def call() -> None:
        for weights in several:
            getattr(weights, method)()

    return call


def measure_shard(report: Report) -> None:
    shard = Weights.random(SHARD)
    first = Weights(shard.codes[:96], shard.scales[:96], shard.weights[:96])
    one_by_one = each([first.one(i) for i in range(96)], "dequantize")
    name = "FP8 -> BF16, 96 experts, one by one from Python"
    report.add(name, "DeepSeek's", median_ms([first.deepseek], fill=False), first.nbytes)
    report.add(name, "ours", median_ms([one_by_one], fill=False), first.nbytes)
    name = "FP8 -> BF16, 96 experts, one launch, Python included"
    report.add(name, "ours", median_ms([first.dequantize], fill=False), first.nbytes)
    report.add(
        "FP8 -> BF16, 288 experts, one launch", "ours", median_ms([shard.dequantize]), shard.nbytes, 0.93
    )
    name = "FP8 -> BF16, 288 experts, one launch, Python included"
    report.add(name, "ours", median_ms([shard.dequantize], fill=False), shard.nbytes)

    name = "BF16 -> FP8, 288 experts"
    report.add(f"{name}, one launch", "ours", median_ms([shard.quantize]), shard.nbytes, 0.80)
    ue8m0 = functools.partial(shard.quantize, scale_fmt="ue8m0")
    report.add(f"{name}, ue8m0", "ours", median_ms([ue8m0]), shard.nbytes, 0.80)
    changed = functools.partial(shard.quantize, likes=[s * 1.01 for s in shard.scales])
    report.add(f"{name}, likes, all changed", "ours", median_ms([changed]), shard.nbytes)
    shard.dequantize()
    unchanged = functools.partial(shard.quantize, likes=[s.clone() for s in shard.scales])
    report.add(f"{name}, likes, none changed", "ours", median_ms([unchanged]), shard.nbytes)


def measure_mixed(report: Report) -> None:
    for extra in ([], [(129, 257)]):
        mixed = Weights.random([(576, 7168), GATE, DOWN, (1536, 7168), (16384, 512), *extra] * 24)
        name = f"{len(mixed.codes)} mixed weights" + (", odd widths among them" if extra else "")
        report.add(f"FP8 -> BF16, {name}", "ours", median_ms([mixed.dequantize]), mixed.nbytes)
        report.add(f"BF16 -> FP8, {name}", "ours", median_ms([mixed.quantize]), mixed.nbytes)


class IntegerWeights:
    """The same weights as FP8, BF16, INT8 and INT4 in groups of 128, in device memory."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self.fp8 = Weights.random(shapes)
        device: dict[str, Any] = {"device": "cuda"}
        self.int8 = [torch.empty(shape, dtype=torch.int8, **device) for shape in shapes]
        self.block_scales = [torch.empty_like(scale) for scale in self.fp8.scales]
        self.row_scales = [torch.empty(rows, 1, **device) for rows, _ in shapes]
        self.packed = [torch.empty(r, c // 8, dtype=torch.int32, **device) for r, c in shapes]
        self.group_scales = [torch.empty(r, c // 128, dtype=torch.bfloat16, **device) for r, c in shapes]
        self.zeros = [torch.empty(r, c // 128, dtype=torch.uint8, **device) for r, c in shapes]
        self.bf16 = self.fp8.weights

    def operations(self) -> dict[str, tuple[Callable[..., Tensor], list[list[Tensor]], float | None]]:
        """Returns each operation, what it reads and writes, and what it must reach."""
        codes, scales = self.fp8.codes, self.fp8.scales
        fp8: dict[str, Any] = {"fp8_scales": scales}
        int8_block, int8_channel = [self.int8, self.block_scales], [self.int8, self.row_scales]
        int4, int4_asymmetric = [self.packed, self.group_scales], [self.packed, self.group_scales, self.zeros]
        ops, bind = triton_integer, functools.partial
        found: dict[str, tuple[Callable[..., Tensor], list[list[Tensor]], float | None]] = {}
        for name, weights, options, read, target in (
            ("FP8", codes, fp8, [codes, scales], 0.80),
            ("BF16", self.bf16, {}, [self.bf16], None),
        ):
            block = bind(ops.quantize_int8_block_into, weights, *int8_block, **options)
            channel = bind(ops.quantize_int8_channel_into, weights, *int8_channel, **options)
            found[f"{name} -> INT8 block"] = block, read + int8_block, target
            found[f"{name} -> INT8 channel"] = channel, read + int8_channel, target
            for search in ("absmax", "mse"):
                call = bind(ops.quantize_int4_group_into, weights, *int4, None, search=search, **options)
                wanted = target if search == "absmax" else None
                found[f"{name} -> INT4 g128 {search}"] = call, read + int4, wanted
        for search in ("absmax", "mse"):
            call = bind(ops.quantize_int4_group_into, codes, *int4_asymmetric, search=search, **fp8)
            found[f"FP8 -> INT4 g128 asymmetric {search}"] = call, [codes, scales, *int4_asymmetric], None
        outs = [self.bf16]
        found["INT8 block -> BF16"] = (
            bind(ops.dequantize_int8_block_into, *int8_block, *outs), int8_block + outs, 0.80
        )  # fmt: skip
        found["INT8 channel -> BF16"] = (
            bind(ops.dequantize_int8_channel_into, *int8_channel, *outs), int8_channel + outs, 0.80
        )  # fmt: skip
        found["INT4 g128 -> BF16"] = (
            bind(ops.dequantize_int4_group_into, *int4, None, *outs), int4 + outs, 0.80
        )  # fmt: skip
        found["INT4 g128 asymmetric -> BF16"] = (
            bind(ops.dequantize_int4_group_into, *int4_asymmetric, *outs), int4_asymmetric + outs, None
        )  # fmt: skip
        return found


def nbytes_of(lists: Sequence[Sequence[Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensors in lists for tensor in tensors)


def measure_integers(report: Report) -> None:
    weights = IntegerWeights(SHARD)
    for name, (call, lists, target) in weights.operations().items():
        num_timed = 5 if "mse" in name else 15
        ms = median_ms([call], num_timed=num_timed)
        report.add(f"{name}, {len(SHARD)} experts", "ours", ms, nbytes_of(lists), target)


def integer_candidates(name: str) -> list[Tiling]:
    """Returns the tilings to try for an operation of `IntegerWeights`."""
    if "-> BF16" in name:
        sizes = [(2, 1024), (4, 1024), (8, 1024), (8, 512), (2, 2048), (4, 2048)]
        return [Tiling(r, c, v, w) for r, c in sizes for v, w in ((8, 4), (16, 4), (8, 8))]
    if "channel" in name:
        sizes = [(2, 1024), (4, 1024), (8, 1024), (2, 2048), (4, 2048), (8, 2048)]
        return [Tiling(r, c, 16, w) for r, c in sizes for w in (1, 2, 4) if 512 <= c // w <= 1024]
    if "block" in name:
        return [Tiling(r, 128, 16, w, m) for r in (16, 32, 64) for w in (2, 4, 8) for m in (0, 64, 80)]
    sizes = [(4, 512), (8, 512), (16, 512), (16, 256), (32, 128), (8, 256), (8, 1024)]
    limits = (0, 128, 168) if "mse" in name else (0, 64, 80, 96, 128)
    shapes = [(r, c, w) for r, c in sizes for w in (1, 2, 4) if 1024 <= r * c // w <= 2048]
    return [Tiling(r, c, 16, w, m) for r, c, w in shapes for m in limits]


def compile_integer(name: str, tiling: Tiling) -> str:
    """As `compile_in_a_worker`, for an operation of `IntegerWeights`."""
    try:
        IntegerWeights([(128, 2048)] * 2).operations()[name][0](tiling=tiling)
        torch.cuda.synchronize()
    except Exception as error:  # one configuration must not end the sweep
        return f"{type(error).__name__}: {error}"
    return ""


def sweep_integers(report: Report, names: Sequence[str]) -> None:
    weights = IntegerWeights(SHARD)
    operations = weights.operations()
    candidates = [(name, tiling) for name in names or operations for tiling in integer_candidates(name)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(12, mp_context=context) as pool:
        problems = list(pool.map(compile_integer, *zip(*candidates, strict=True)))
    results: dict[str, list[tuple[float, Tiling]]] = {}
    for (name, tiling), problem in zip(candidates, problems, strict=True):
        if problem:
            print(f"left out: {name} {tiling}: {problem[:200]}")
            continue
        call, lists, _ = operations[name]
        ms = median_ms([functools.partial(call, tiling=tiling)], num_timed=3)
        ratio = report.add(name, str(tiling), ms, nbytes_of(lists))
        results.setdefault(name, []).append((ratio, tiling))
    for name, rows in results.items():
        print(f"\n{name}")
        for ratio, tiling in sorted(rows, key=lambda row: -row[0])[:6]:
            print(f"  {ratio:.3f} {tiling}")


def measure(report: Report) -> None:
    for shape, target in ((GATE, 0.70), ((18432, 7168), 0.88), ((131072, 7168), 0.91)):
        measure_one(report, shape, target)
    measure_shard(report)
    measure_mixed(report)


def dequantize_candidates() -> list[Tiling]:
    return [
        Tiling(rows, columns, vector, num_warps)
        for rows, columns in (
            (2, 1024),
            (4, 1024),
            (8, 1024),
            (16, 1024),
            (32, 512),
            (8, 512),
            (16, 512),
            (4, 2048),
            (8, 2048),
            (8, 256),
            (64, 128),
            (128, 128),
        )
        for vector, num_warps in ((8, 4), (16, 4), (8, 8), (16, 8))
        if 16 <= rows * columns // num_warps // 32 <= 128
    ]


def quantize_candidates() -> list[Tiling]:
    tilings = [
        Tiling(rows, 128, vector, num_warps)
        for rows, vector, num_warps in itertools.product((16, 32, 64, 128), (8, 16), (4, 8, 16))
    ]
    tilings += [Tiling(rows, 256, 16, warps) for rows in (32, 64, 128) for warps in (8, 16)]
    return tilings + [Tiling(128, 128, 16, 8, registers) for registers in (72, 80, 96)]


def compile_in_a_worker(kind: str, tiling: Tiling) -> str:
    """Puts the kernels of `tiling` into Triton's cache on disk; returns why it could not."""
    try:
        for shapes in ([(128, 2048)], [(128, 2048)] * 2):
            bind(Weights.random(shapes), kind, tiling)()
        torch.cuda.synchronize()
    except Exception as error:  # one configuration must not end the sweep
        return f"{type(error).__name__}: {error}"
    return ""


def sweep(report: Report) -> None:
    candidates = [("dequantize", t) for t in dequantize_candidates()]
    candidates += [("quantize", t) for t in quantize_candidates()]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(8, mp_context=context) as pool:
        problems = list(pool.map(compile_in_a_worker, *zip(*candidates, strict=True)))
    for candidate, problem in zip(candidates, problems, strict=True):
        if problem:
            print(f"left out: {candidate}: {problem[:300]}")
    candidates = [c for c, problem in zip(candidates, problems, strict=True) if not problem]

    shard = Weights.random(SHARD)
    several, large = rotating(GATE), rotating((18432, 7168))
    for kind, default in (("dequantize", DEQUANTIZE_TILING), ("quantize", QUANTIZE_TILING)):
        results = []
        for tiling in dict.fromkeys([default, *(t for k, t in candidates if k == kind)]):
            row = [
                report.add(name, f"{kind} {tiling}", median_ms(calls, num_timed=num_timed), nbytes)
                for name, calls, nbytes, num_timed in (
                    ("grouped", [bind(shard, kind, tiling)], shard.nbytes, 9),
                    ("(18432, 7168)", [bind(w, kind, tiling) for w in large], large[0].nbytes, 20),
                    ("(2048, 7168)", [bind(w, kind, tiling) for w in several], several[0].nbytes, 30),
                )
            ]
            results.append((row, tiling))
        print(f"\n{kind}; default {default}\n")
        print("| rows | columns | vector | warps | registers | 288 experts | (18432, 7168) | (2048, 7168) |")
        print("|---|---|---|---|---|---|---|---|")
        for row, t in sorted(results, key=lambda r: -r[0][0]):
            print(
                f"| {t.rows} | {t.columns} | {t.vector} | {t.num_warps} | {t.max_registers} | "
                + " | ".join(f"{x:.3f}" for x in row)
                + (" | <- default" if t == default else " |")
            )


def bind(weights: Weights, kind: str, tiling: Tiling) -> Callable[[], Tensor]:
    return lambda: (
        weights.dequantize(tiling=tiling) if kind == "dequantize" else weights.quantize(tiling=tiling)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true", help="try tile configurations instead")
    parser.add_argument("--only", choices=("fp8", "integer"), help="measure these kernels alone")
    parser.add_argument(
        "--names", nargs="*", default=[], help="with --sweep --only integer: these operations"
    )
    parser.add_argument("--json", metavar="FILE", help="write all rows there as well")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(copy_bandwidth())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", end="; ")
    print(f"copy {report.copy / 1e9:.0f} GB/s read + written")
    if arguments.sweep:
        if arguments.only == "integer":
            sweep_integers(report, arguments.names)
        else:
            sweep(report)
    else:
        if arguments.only != "integer":
            measure(report)
        if arguments.only != "fp8":
            measure_integers(report)
        print()
        report.print()
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"copy": report.copy, "rows": report.rows}, file, indent=1)


if __name__ == "__main__":
    main()
