"""Times the FP8 block kernels on one core beside what others offer for the same work.

    python benchmarks/cpu_kernels.py [--repeats 7]

All of them in one run, interleaved, on random data of real shapes: (2048, 7168) is one expert's gate, (576,
7168) is kv_a_proj with its partial block row. Before anything is timed the results are compared.
Prints medians as a Markdown table; what is not installed, or refuses a shape, gets a line that says so.

llm-compressor's model-free path is timed if its package is importable; `pip install --no-deps --target
DIR llmcompressor==0.14` and `--llmcompressor DIR` are enough, since only its calibration code is
loaded, without what the package imports at its top.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_tools.kernels import cpu_fp8_block, reference

SHAPES = [(2048, 7168), (576, 7168)]
Runner = Callable[[], Any]


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    return scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]


def naive_dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.float() * spread(scale, codes.shape)).bfloat16()


def naive_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = blocks.abs().amax((1, 3)) / reference.FP8_MAX
    codes = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:rows, :columns], scale


def ours(codes: Tensor, scale: Tensor, weight: Tensor) -> dict[str, dict[str, Runner]]:
    """Returns our runners; like a conversion, they write into memory that is reused."""
    out, new_codes, new_scale = torch.empty_like(weight), torch.empty_like(codes), torch.empty_like(scale)
    out32 = torch.empty(weight.shape)

    def quantize(source: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        cpu_fp8_block.quantize_fp8_block_into([source], [new_codes], [new_scale], **options)
        return new_codes, new_scale

    def dequantize(target: Tensor) -> Tensor:
        cpu_fp8_block.dequantize_fp8_block_into([codes], [scale], [target])
        return target

    def quantize_fresh() -> tuple[Tensor, Tensor]:
        fresh = torch.empty_like(codes), torch.empty_like(scale)
        cpu_fp8_block.quantize_fp8_block_into([weight], [fresh[0]], [fresh[1]])
        return fresh

    unchanged = reference.dequantize_fp8_block(codes, scale)
    return {
        "FP8 to BF16": {
            "dsv3-tools": lambda: dequantize(out),
            "dsv3-tools, into fresh memory": lambda: dequantize(torch.empty_like(weight)),
            "dsv3-tools, to float32": lambda: dequantize(out32),
        },
        "BF16 to FP8": {
            "dsv3-tools": lambda: quantize(weight),
            "dsv3-tools, into fresh memory": quantize_fresh,
            "dsv3-tools, ue8m0": lambda: quantize(weight, scale_fmt="ue8m0"),
            "dsv3-tools, likes, all unchanged": lambda: quantize(unchanged, likes=[scale]),
            "dsv3-tools, likes, all changed": lambda: quantize(weight, likes=[scale * 1.01]),
        },
    }


def compressed_tensors_dequantize(codes: Tensor, scale: Tensor) -> Runner:
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    converter = FP8BlockDequantizer(weight_block_size=(128, 128), dtype=torch.bfloat16)
    return lambda: converter.process({"m.weight": codes, "m.weight_scale_inv": scale})["m.weight"]


def transformers_dequantize(codes: Tensor, scale: Tensor) -> Runner:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    operation = Fp8Dequantize(None)
    return lambda: operation._dequantize_one(codes, scale, output_dtype=torch.bfloat16)


def llm_compressor_quantize(weight: Tensor) -> Runner:
    """Returns the calls of `ModelFreePtqConverter._process_standard` for one weight, FP8_BLOCK preset."""
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.entrypoints.model_free import lifecycle

    scheme = preset_name_to_scheme("FP8_BLOCK", ["Linear"])

    def run() -> tuple[Tensor, Tensor]:
        module = lifecycle.initialize_quantized_linear(weight, scheme, "cpu")
        lifecycle.calibrate_weight(module)
        compress_module(module)
        return module.weight, module.weight_scale

    return run


def shadow_llm_compressor(directory: Path) -> None:
    """Makes llm-compressor's calibration importable without its packages' `__init__`s and `datasets`.

    Those pull in a training stack; of `datasets` only names in type annotations are used.
    """
    root = "llmcompressor"
    for name in (
        root,
        f"{root}.entrypoints",
        f"{root}.entrypoints.model_free",
        f"{root}.modifiers",
        f"{root}.modifiers.quantization",
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(directory.joinpath(*name.split(".")))]
        sys.modules[name] = package
    if importlib.util.find_spec("datasets") is None:
        stub = types.ModuleType("datasets")
        for name in ("Dataset", "DatasetDict", "IterableDataset"):
            setattr(stub, name, type(name, (), {}))
        sys.modules["datasets"] = stub


def same_bits(got: Any, expected: Tensor) -> str:
    tensor = got[0] if isinstance(got, tuple) else got
    if tensor.dtype != expected.dtype:
        return "-"
    width = torch.uint8 if expected.element_size() == 1 else torch.int16
    num_different = int((tensor.contiguous().view(width) != expected.view(width)).sum())
    return "yes" if num_different == 0 else f"{num_different / expected.numel():.2%} differ"


def measure(runners: dict[str, Runner], repeats: int) -> dict[str, float]:
    """Returns median seconds; the rounds go through all runners, so that noise meets them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare(title: str, runners: dict[str, Runner], expected: Tensor, repeats: int) -> None:
    shape = tuple(expected.shape)
    print(f"\n| {title}, {shape} | ms | GB/s of FP8 | time / ours | same bytes |\n|---|---|---|---|---|")
    usable, bits = {}, {}
    for name, run in runners.items():
        try:
            bits[name] = same_bits(run(), expected)  # the warm-up too
            usable[name] = run
        except Exception as error:  # noqa: PERF203  (each runner may fail in its own way)
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | |")
    medians = measure(usable, repeats)
    for name, seconds in medians.items():
        rate = expected.numel() / seconds / 1e9
        ratio = seconds / medians["dsv3-tools"]
        print(f"| {name} | {seconds * 1e3:.2f} | {rate:.2f} | {ratio:.2f} | {bits[name]} |")


def later(make: Callable[..., Runner], *args: Tensor) -> Runner:
    """Builds a runner at its first call, where a package that is not installed gets its line."""
    made: list[Runner] = []

    def run() -> Any:
        if not made:
            made.append(make(*args))
        return made[0]()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the FP8 block kernels on one core.")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds; the median is shown")
    parser.add_argument("--llmcompressor", type=Path, help="folder that holds the llmcompressor package")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.llmcompressor:
        sys.path.append(str(options.llmcompressor))
        shadow_llm_compressor(options.llmcompressor)
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        codes, scale = reference.quantize_fp8_block(weight)
        runners = ours(codes, scale, weight)
        runners["FP8 to BF16"] |= {
            "compressed-tensors FP8BlockDequantizer": later(compressed_tensors_dequantize, codes, scale),
            "transformers Fp8Dequantize": later(transformers_dequantize, codes, scale),
            "naive torch": lambda c=codes, s=scale: naive_dequantize(c, s),  # type: ignore[misc]
        }
        runners["BF16 to FP8"] |= {
            "llm-compressor model-free": later(llm_compressor_quantize, weight),
            "naive torch": lambda w=weight: naive_quantize(w),  # type: ignore[misc]
        }
        compare(
            "FP8 to BF16",
            runners["FP8 to BF16"],
            reference.dequantize_fp8_block(codes, scale),
            options.repeats,
        )
        compare("BF16 to FP8", runners["BF16 to FP8"], codes, options.repeats)


if __name__ == "__main__":
    main()
