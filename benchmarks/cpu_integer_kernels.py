"""Times the INT8 and INT4 kernels on one core beside what others offer for the same work.

    python benchmarks/cpu_integer_kernels.py [--repeats 5] [--llmcompressor DIR]

All of them in one run, interleaved, on random data of an expert's shapes. Others have no single function from
FP8 to integers; they dequantize to BF16 first, which is timed with the rest. Before anything is timed the
results are compared with the definition (others round elsewhere, so some of their codes differ). What takes
long is timed in fewer rounds: no runner gets more than a minute.

llm-compressor's model-free path: see `cpu_kernels.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_kernels import later, naive_dequantize, shadow_llm_compressor
from torch import Tensor

from dsv3_tools import kernels
from dsv3_tools.kernels import reference, reference_integer

SHAPES = [(2048, 7168), (7168, 2048)]
MAX_SECONDS = 60.0
Runner = Callable[[], Any]


class Data:
    """One weight as FP8 and BF16, its integer forms by the definition, and memory that is reused."""

    def __init__(self, shape: tuple[int, int]) -> None:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        self.codes, self.scale = reference.quantize_fp8_block(weight)
        self.weight = reference.dequantize_fp8_block(self.codes, self.scale)
        self.values = reference.dequantize_fp8_block(self.codes, self.scale, dtype=torch.float32)
        self.out = torch.empty(shape, dtype=torch.bfloat16)

    def int4(self, group_size: int, search: str, *, fp8: bool, symmetric: bool = True) -> Runner:
        rows, columns = self.weight.shape
        packed = torch.empty(rows, columns // 8, dtype=torch.int32)
        scale = torch.empty(rows, columns // group_size, dtype=torch.bfloat16)
        zeros = None if symmetric else [torch.empty(scale.shape, dtype=torch.uint8)]

        def run() -> Tensor:
            kernels.quantize_int4_group_into(
                [self.codes if fp8 else self.weight],
                [packed],
                [scale],
                zeros,
                search=search,
                fp8_scales=[self.scale] if fp8 else None,
            )
            return packed

        return run

    def int8(self, name: str, *, fp8: bool) -> Runner:
        codes = torch.empty(self.weight.shape, dtype=torch.int8)
        rows = self.weight.shape[0]
        scale = torch.empty_like(self.scale) if name == "block" else torch.empty(rows, 1)
        function = kernels.quantize_int8_block_into if name == "block" else kernels.quantize_int8_channel_into

        def run() -> Tensor:
            function(
                [self.codes if fp8 else self.weight],
                [codes],
                [scale],
                fp8_scales=[self.scale] if fp8 else None,
            )
            return codes

        return run

    def from_int4(self, packed: Tensor, scale: Tensor) -> Tensor:
        kernels.dequantize_int4_group_into([packed], [scale], None, [self.out])
        return self.out

    def from_int8(self, codes: Tensor, scale: Tensor) -> Tensor:
        if scale.shape[1] == 1:
            kernels.dequantize_int8_channel_into([codes], [scale], [self.out])
        else:
            kernels.dequantize_int8_block_into([codes], [scale], [self.out])
        return self.out


# ------------------------------------------------------------------------------------------------ others


def torch_int4(weight: Tensor, group_size: int) -> Tensor:
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    scale = groups.abs().amax(2, keepdim=True) / 7.5
    codes = (groups / scale).round().clamp(-8, 7).to(torch.int32).add_(8).reshape(weight.shape[0], -1, 8)
    return (codes << torch.arange(0, 32, 4, dtype=torch.int32)).sum(2, dtype=torch.int32)


def torch_int8_channel(weight: Tensor) -> Tensor:
    values = weight.float()
    return (values / (values.abs().amax(1, keepdim=True) / 127)).round().clamp(-128, 127).to(torch.int8)


def torch_int8_block(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 127
    return (blocks / scale).round().clamp(-128, 127).to(torch.int8).reshape(rows, columns)


def torch_from_int4(packed: Tensor, scale: Tensor) -> Tensor:
    codes = (packed[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    groups = codes.reshape(*scale.shape, -1) - 8
    return (groups.float() * scale.float()[:, :, None]).bfloat16().reshape(packed.shape[0], -1)


def torch_from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.float() * scale).bfloat16()


def arguments(preset: str, observer: str = "", block: bool = False) -> Any:
    """Returns compressed-tensors' scheme of a preset."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    if observer:
        scheme.weights.observer = observer
    if block:
        scheme.weights = scheme.weights.model_copy(
            update={"strategy": "block", "block_structure": [128, 128]}
        )
    return scheme


def compressed_tensors(preset: str, weight: Tensor, *, block: bool = False) -> Runner:
    """Returns its own steps for one weight: scale from the extremes, quantize, pack."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = arguments(preset, block=block).weights
    rows = weight.shape[0]

    def run() -> Tensor:
        if block:
            grouped = weight.reshape(rows // 128, 128, -1, 128)
            low, high = grouped.amin((1, 3)), grouped.amax((1, 3))
        else:
            grouped = weight.reshape(rows, -1, args.group_size or weight.shape[1])
            low, high = grouped.amin(2), grouped.amax(2)
        scale, zero = calculate_qparams(low, high, args)
        codes = quantize(weight, scale, zero, args, dtype=torch.int8)
        return codes if args.num_bits == 8 else pack_to_int32(codes, args.num_bits)

    return run


def compressed_tensors_from_int4(packed: Tensor, scale: Tensor) -> Runner:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = arguments("W4A16").weights
    shape = torch.Size((packed.shape[0], packed.shape[1] * 8))
    return lambda: dequantize(unpack_from_int32(packed, 4, shape), scale, None, args, dtype=torch.bfloat16)


def compressed_tensors_from_int8(codes: Tensor, scale: Tensor) -> Runner:
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = arguments("W8A8").weights
    return lambda: dequantize(codes, scale, None, args, dtype=torch.bfloat16)


def llm_compressor(preset: str, weight: Tensor, *, observer: str = "", block: bool = False) -> Runner:
    """Returns the calls of `ModelFreePtqConverter._process_standard` for one weight."""
    from compressed_tensors.compressors import compress_module
    from llmcompressor.entrypoints.model_free import lifecycle

    scheme = arguments(preset, observer, block)

    def run() -> Tensor:
        module = lifecycle.initialize_quantized_linear(weight, scheme, "cpu")
        lifecycle.calibrate_weight(module)
        compress_module(module)
        return module.weight_packed if hasattr(module, "weight_packed") else module.weight

    return run


def after_dequantizing(data: Data, make: Callable[[Tensor], Runner]) -> Runner:
    """Adds what others do first; compressed-tensors' dequantizer is as slow as this."""
    made = later(make, data.weight)

    def run() -> Any:
        naive_dequantize(data.codes, data.scale)
        return made()

    return run


# ---------------------------------------------------------------------------------------------- tables


def quantize_tables(data: Data) -> dict[str, tuple[Tensor, int, dict[str, Runner]]]:
    """Returns, per title, the expected codes, the bytes read for an element, and the runners."""
    to_int4 = partial(reference_integer.quantize_int4_group, data.values)
    block = reference_integer.quantize_int8_block(data.values, fp8_scale=data.scale)[0]
    channel = reference_integer.quantize_int8_channel(data.values)[0]
    bf16 = data.weight.float()
    return {
        "FP8 to INT4 g128, absmax": (
            to_int4(search="absmax")[0],
            1,
            {
                "dsv3-tools": data.int4(128, "absmax", fp8=True),
                "dsv3-tools, asymmetric": data.int4(128, "absmax", fp8=True, symmetric=False),
                "dsv3-tools, g32": data.int4(32, "absmax", fp8=True),
                "compressed-tensors": after_dequantizing(data, partial(compressed_tensors, "W4A16")),
                "llm-compressor model-free": after_dequantizing(data, partial(llm_compressor, "W4A16")),
                "plain torch": after_dequantizing(data, lambda w: partial(torch_int4, w, 128)),
            },
        ),
        "FP8 to INT4 g128, mse": (
            to_int4(search="mse")[0],
            1,
            {
                "dsv3-tools": data.int4(128, "mse", fp8=True),
                "dsv3-tools, asymmetric": data.int4(128, "mse", fp8=True, symmetric=False),
                "dsv3-tools, g32": data.int4(32, "mse", fp8=True),
                "llm-compressor model-free, memoryless_mse": after_dequantizing(
                    data, partial(llm_compressor, "W4A16", observer="memoryless_mse")
                ),
            },
        ),
        "BF16 to INT4 g128, absmax": (
            reference_integer.quantize_int4_group(bf16, search="absmax")[0],
            2,
            {
                "dsv3-tools": data.int4(128, "absmax", fp8=False),
                "dsv3-tools, mse": data.int4(128, "mse", fp8=False),
                "compressed-tensors": later(partial(compressed_tensors, "W4A16"), data.weight),
                "llm-compressor model-free": later(partial(llm_compressor, "W4A16"), data.weight),
                "plain torch": lambda: torch_int4(data.weight, 128),
            },
        ),
        "FP8 to INT8 block": (
            block,
            1,
            {
                "dsv3-tools": data.int8("block", fp8=True),
                "dsv3-tools, from BF16": data.int8("block", fp8=False),
                "compressed-tensors": after_dequantizing(
                    data, partial(compressed_tensors, "W8A8", block=True)
                ),
                "plain torch": after_dequantizing(data, lambda w: partial(torch_int8_block, w)),
            },
        ),
        "FP8 to INT8 channel": (
            channel,
            1,
            {
                "dsv3-tools": data.int8("channel", fp8=True),
                "dsv3-tools, from BF16": data.int8("channel", fp8=False),
                "compressed-tensors": after_dequantizing(data, partial(compressed_tensors, "W8A8")),
                "llm-compressor model-free": after_dequantizing(data, partial(llm_compressor, "W8A8")),
                "plain torch": after_dequantizing(data, lambda w: partial(torch_int8_channel, w)),
            },
        ),
    }


def dequantize_tables(data: Data) -> dict[str, tuple[Tensor, float, dict[str, Runner]]]:
    packed, scale4, _ = reference_integer.quantize_int4_group(data.values)
    packed32, scale32, _ = reference_integer.quantize_int4_group(data.values, group_size=32)
    codes, scale8 = reference_integer.quantize_int8_channel(data.values)
    block_codes, block_scale = reference_integer.quantize_int8_block(data.values)
    return {
        "INT4 g128 to BF16": (
            reference_integer.dequantize_int4_group(packed, scale4),
            0.5,
            {
                "dsv3-tools": lambda: data.from_int4(packed, scale4),
                "dsv3-tools, g32": lambda: data.from_int4(packed32, scale32),
                "compressed-tensors": later(compressed_tensors_from_int4, packed, scale4),
                "plain torch": lambda: torch_from_int4(packed, scale4),
            },
        ),
        "INT8 channel to BF16": (
            reference_integer.dequantize_int8_channel(codes, scale8),
            1,
            {
                "dsv3-tools": lambda: data.from_int8(codes, scale8),
                "dsv3-tools, block": lambda: data.from_int8(block_codes, block_scale),
                "compressed-tensors": later(compressed_tensors_from_int8, codes, scale8),
                "plain torch": lambda: torch_from_int8(codes, scale8),
            },
        ),
    }


def same(got: Tensor, expected: Tensor) -> str:
    """Says whether results are equal, or how much of them is."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return "-"
    if got.dtype == torch.int32:
        got, expected = reference_integer.unpack_int4(got), reference_integer.unpack_int4(expected)
    num_different = int((got != expected).sum())
    return "yes" if num_different == 0 else f"{num_different / expected.numel():.2%} differ"


def measure(runners: dict[str, Runner], repeats: int) -> dict[str, float]:
    """Returns median seconds; the rounds go through all runners, so that noise meets them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            if sum(seconds[name]) > MAX_SECONDS:
                continue
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare(title: str, expected: Tensor, nbytes: float, runners: dict[str, Runner], repeats: int) -> None:
    shape = (expected.shape[0], expected.shape[1] * (8 if expected.dtype == torch.int32 else 1))
    print(
        f"\n| {title}, {shape} | ms | GB/s in | G weights/s | time / ours | same |\n|---|---|---|---|---|---|"
    )
    usable, equal = {}, {}
    for name, run in runners.items():
        try:
            got = run()  # the warm-up too
            equal[name] = "-" if name.startswith("dsv3-tools, ") else same(got, expected)
            usable[name] = run
        except Exception as error:  # noqa: PERF203  (each runner may fail in its own way)
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | | |")
    medians = measure(usable, repeats)
    for name, seconds in medians.items():
        rate = shape[0] * shape[1] / seconds / 1e9
        ratio = seconds / medians["dsv3-tools"]
        print(
            f"| {name} | {seconds * 1e3:.1f} | {rate * nbytes:.2f} | {rate:.3f} "
            f"| {ratio:.1f} | {equal[name]} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the INT8 and INT4 kernels on one core.")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median is shown")
    parser.add_argument("--llmcompressor", type=Path, help="folder that holds the llmcompressor package")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.llmcompressor:
        sys.path.append(str(options.llmcompressor))
        shadow_llm_compressor(options.llmcompressor)
    for shape in SHAPES:
        data = Data(shape)
        for title, (expected, nbytes, runners) in (quantize_tables(data) | dequantize_tables(data)).items():
            compare(title, expected, nbytes, runners, options.repeats)


if __name__ == "__main__":
    main()
