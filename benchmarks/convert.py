"""Whole conversions, FP8 to BF16 and back and to integers, against the machine's floor and other tools.

    python benchmarks/convert.py                        2 CPU workers, page cache warm and cold
    python benchmarks/convert.py --peers reference-loop compressed-tensors --rounds 3 --warm-only
    python benchmarks/convert.py --quantize             FP8 to INT4 and INT8
    python benchmarks/convert.py --quantize --peers llm-compressor auto-round --peer-packages DIR --rounds 3
    python benchmarks/convert.py --device cuda --workers 3 --experts 88 --shards 3
    python benchmarks/convert.py --folder /dev/shm --scaling cuda:0 cuda:0,1
    python benchmarks/convert.py --folder /dev/shm --scaling cpu cpu --workers 1

Every contestant runs in a process of its own, which imports and compiles first and then reports the
seconds until its output is on disk and the memory that it used above that of its imports. They take
turns within a round; the figures are medians over the rounds, the ratios medians of the rounds' ratios.

The floor reads every source byte once and writes as many bytes as the result has, in blocks of 4 MiB,
with as many threads and an fsync for each file: what the machine does without any conversion.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dsv3_tools
from dsv3_tools.conversion.api import open_bf16_to_fp8, open_fp8_to_bf16
from dsv3_tools.quantize.api_int4 import open_quantize_int4
from dsv3_tools.quantize.api_int8 import open_quantize_int8

BLOCK_NBYTES = 4 << 20
PEERS = ("reference-loop", "compressed-tensors", "llm-compressor", "auto-round")

QUANTIZE: dict[str, dict[str, Any]] = {
    "quantize int4 absmax": {"scale_search": "absmax"},
    "quantize int4 mse": {"scale_search": "mse"},
    "quantize int8 channel": {"scheme": "channel"},
    "quantize int8 block": {"scheme": "block"},
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.one:
        print(json.dumps(run_one(arguments)))
        return
    folder = Path(arguments.folder) / "dsv3-bench"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        make_source(folder / "fp8", arguments)
        describe(folder / "fp8")
        if arguments.scaling:
            report_scaling(folder, arguments)
            return
        if arguments.quantize:
            for name in QUANTIZE:
                report(name, folder, arguments, cold=False)
            return
        for cold in (False, True) if can_drop_caches() and not arguments.warm_only else (False,):
            report("fp8-to-bf16", folder, arguments, cold=cold)
        if not arguments.peers:  # they only know the way to BF16
            report("bf16-to-fp8", folder, arguments, cold=False)
    finally:
        shutil.rmtree(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="/tmp", help="where the checkpoints are written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=40, help="of 44 million parameters each")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-only", action="store_true", help="leave out the cold page cache")
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS, help="other tools to run too (slow)")
    parser.add_argument("--scaling", nargs=2, metavar="DEVICES", help="compare two device lists instead")
    parser.add_argument("--quantize", action="store_true", help="measure quantization to integers")
    parser.add_argument("--peer-packages", help="where `pip install --target DIR --no-deps` has put peers")
    parser.add_argument("--ratio", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_source(path: Path, arguments: argparse.Namespace) -> None:
    """One MoE layer of DeepSeek-V3's real shapes, with as many experts as asked for."""
    shape = {"first_k_dense_replace": 0, "vocab_size": 1024, "num_nextn_predict_layers": 0}
    dsv3_tools.sample(path, layers=1, experts=arguments.experts, shards=arguments.shards, overrides=shape)


def describe(path: Path) -> None:
    found = dsv3_tools.inspect(path)
    print(f"source: {found.nbytes / 1e9:.2f} GB in {found.num_shards} shards, {found.num_tensors} tensors\n")


def report(operation: str, folder: Path, arguments: argparse.Namespace, *, cold: bool) -> None:
    """Prints a table of all contestants for one operation."""
    source = folder / "fp8"
    if operation == "bf16-to-fp8":
        source = folder / "bf16"
        if not source.exists():
            dsv3_tools.convert_fp8_to_bf16(folder / "fp8", source, device=arguments.device)
    names = ["floor", operation]
    if arguments.device != "cpu":
        names.append(operation + " on the cpu")
    if operation in ("fp8-to-bf16", "quantize int4 absmax"):
        names += arguments.peers
    arguments.ratio = ratio_of(operation, source)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            rounds[name].append(run_in_process(name, source, folder / "out", arguments, cold=cold))
    where = f"{arguments.workers} workers on {arguments.device}, page cache {'cold' if cold else 'warm'}"
    print(f"{operation}, {where}, median of {arguments.rounds} rounds\n")
    print("| | seconds | over the floor | memory above imports |\n|---|---|---|---|")
    for name in names:
        seconds = statistics.median(found["seconds"] for found in rounds[name])
        pairs = zip(rounds[name], rounds["floor"], strict=True)
        ratio = statistics.median(mine["seconds"] / floor["seconds"] for mine, floor in pairs)
        memory = statistics.median(found["memory"] for found in rounds[name])
        print(f"| {name} | {seconds:.2f} | {ratio:.2f} | {memory / 1e6:.0f} MB |")
    print(flush=True)


def ratio_of(operation: str, source: Path) -> float:
    """Returns the bytes that the operation writes for each byte that it reads."""
    opened = {
        "fp8-to-bf16": lambda: open_fp8_to_bf16(source),
        "bf16-to-fp8": lambda: open_bf16_to_fp8(source),
        "quantize int4": lambda: open_quantize_int4(source),
        "quantize int8": lambda: open_quantize_int8(source),
    }[operation.rpartition(" ")[0] or operation]
    with opened() as (plan, *_):
        return plan.nbytes_out / plan.nbytes_in


def report_scaling(folder: Path, arguments: argparse.Namespace) -> None:
    """Prints the time with N workers on the first devices over that with 2N on the second."""
    settings = [(arguments.scaling[0], arguments.workers), (arguments.scaling[1], 2 * arguments.workers)]
    times: list[list[float]] = [[], []]
    for _ in range(arguments.rounds):
        for mine, (arguments.device, arguments.workers) in zip(times, settings, strict=True):
            found = run_in_process("fp8-to-bf16", folder / "fp8", folder / "out", arguments, cold=False)
            mine.append(found["seconds"])
    for mine, (devices, workers) in zip(times, settings, strict=True):
        print(f"fp8-to-bf16 on {devices} with {workers} workers: {statistics.median(mine):.2f} s")
    print(f"scaling: {statistics.median(a / b for a, b in zip(*times, strict=True)):.2f}", flush=True)


def run_in_process(
    name: str, source: Path, out: Path, arguments: argparse.Namespace, *, cold: bool
) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    device = "cpu" if name.endswith("on the cpu") else arguments.device
    command = [sys.executable, __file__, "--one", name, "--source", str(source), "--out", str(out)]
    command += ["--device", device, "--workers", str(arguments.workers)]
    command += ["--ratio", str(arguments.ratio or 1.0)]
    if arguments.peer_packages:
        command += ["--peer-packages", arguments.peer_packages]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(out, ignore_errors=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_one(arguments: argparse.Namespace) -> dict[str, float]:
    """Warms up, runs one contestant, returns seconds and memory."""
    contestant = {
        "floor": floor,
        "fp8-to-bf16": ours,
        "bf16-to-fp8": ours,
        "fp8-to-bf16 on the cpu": ours,
        "bf16-to-fp8 on the cpu": ours,
        "reference-loop": reference_loop,
        "compressed-tensors": compressed_tensors,
        "llm-compressor": llm_compressor,
        "auto-round": auto_round,
        **dict.fromkeys(QUANTIZE, ours),
        **{f"{name} on the cpu": ours for name in QUANTIZE},
    }[arguments.one]
    source, out = Path(arguments.source), Path(arguments.out)
    run = contestant(source, out, arguments)
    before = memory_now()
    began = time.perf_counter()
    run()
    sync_all(out)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": memory_peak() - before}


def floor(source: Path, out: Path, arguments: argparse.Namespace):
    files = sorted(source.glob("*.safetensors"))

    def copy(mine: list[Path]) -> None:
        block = memoryview(bytearray(BLOCK_NBYTES))
        for path in mine:
            with (
                path.open("rb", buffering=0) as reading,
                (out / path.name).open("xb", buffering=0) as writing,
            ):
                while count := reading.readinto(block):
                    left = round(count * arguments.ratio)
                    while left > 0:
                        left -= writing.write(block[:left])
                os.fsync(writing.fileno())

    def run() -> None:
        out.mkdir()
        shares = [files[number :: arguments.workers] for number in range(arguments.workers)]
        threads = [threading.Thread(target=copy, args=(share,)) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def ours(source: Path, out: Path, arguments: argparse.Namespace):
    name = arguments.one.removesuffix(" on the cpu")
    kind = name.rpartition(" ")[0] or f"convert {name}"
    function = getattr(dsv3_tools, kind.replace(" ", "_").replace("-", "_"))
    convert = partial(function, **QUANTIZE.get(name, {}))
    warm_up(arguments, out.parent, convert if name in QUANTIZE else None)
    return lambda: convert(source, out, device=arguments.device, workers=arguments.workers)


def warm_up(arguments: argparse.Namespace, folder: Path, convert: Callable[..., Any] | None = None) -> None:
    """Compiles the kernels, starts every device and takes every worker's memory, on a tiny checkpoint."""
    small = {"hidden_size": 128, "moe_intermediate_size": 128, "vocab_size": 128, "num_attention_heads": 1}
    small |= {
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
    }
    place = folder / f"warm-up-{os.getpid()}"
    workers, device = arguments.workers, arguments.device
    dsv3_tools.sample(place / "fp8", layers=2 * workers, experts=1, shards=workers, overrides=small)
    dsv3_tools.convert_fp8_to_bf16(place / "fp8", place / "bf16", device=device, workers=workers)
    dsv3_tools.convert_bf16_to_fp8(place / "bf16", place / "again", device=device, workers=workers)
    if convert is not None:
        convert(place / "fp8", place / "integers", device=device, workers=workers)
    shutil.rmtree(place)


def reference_loop(source: Path, out: Path, arguments: argparse.Namespace):
    """The release's `fp8_cast_bf16.py` as it is described: a shard at a time, whole, tensor by tensor."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(arguments.workers)
    device = "cuda" if arguments.device.startswith("cuda") else "cpu"

    def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if device == "cuda":
            from gpu_kernels import deepseek_weight_dequant

            weight = torch.empty(codes.shape, dtype=torch.bfloat16, device=device)
            deepseek_weight_dequant(codes, scale, weight)
            return weight
        rows, columns = codes.shape
        spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return (codes.to(torch.float32) * spread).to(torch.bfloat16)

    def run() -> None:
        out.mkdir()
        for path in sorted(source.glob("*.safetensors")):
            tensors = load_file(path, device=device)
            result = {}
            for name, tensor in tensors.items():
                if name.endswith("_scale_inv"):
                    continue
                scale = tensors.get(f"{name}_scale_inv")
                result[name] = tensor if scale is None else dequantize(tensor, scale)
            save_file(result, out / path.name)

    return run


def compressed_tensors(source: Path, out: Path, arguments: argparse.Namespace):
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    converter = FP8BlockDequantizer.from_pretrained(source)
    return lambda: convert_checkpoint(
        source, out, converter, max_workers=arguments.workers, device=arguments.device
    )


def llm_compressor(source: Path, out: Path, arguments: argparse.Namespace):
    """Its path without a model: FP8 dequantized by compressed-tensors, then INT4 in groups of 128."""
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
    from cpu_kernels import shadow_llm_compressor

    sys.path.append(arguments.peer_packages)
    shadow_llm_compressor(Path(arguments.peer_packages))
    del sys.modules["llmcompressor.entrypoints.model_free"]  # this one's own `__init__` is wanted
    from llmcompressor.entrypoints.model_free import model_free_ptq

    ignored = ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp.gate$", "lm_head", "re:.*embed_tokens"]
    return lambda: model_free_ptq(
        source,
        out,
        scheme="W4A16",
        ignore=ignored,
        max_workers=arguments.workers,
        device=arguments.device,
        converter=FP8BlockDequantizer.from_pretrained(source),
    )


def auto_round(source: Path, out: Path, arguments: argparse.Namespace):
    """Its path without a model; it starts processes of its own, which need its packages, too.

    Of `datasets` it imports names that calibration needs and this path does not: a stub stands in for it.
    """
    import torch

    stub = out.parent / "stubs" / "datasets"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "__init__.py").write_text(
        "def __getattr__(name):\n    if name.startswith('__'):\n        raise AttributeError(name)\n"
        "    return type(name, (), {})\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([arguments.peer_packages, str(stub.parent)])
    sys.path += [arguments.peer_packages, str(stub.parent)]
    torch.set_num_threads(arguments.workers)
    from auto_round import AutoRound

    compressor = AutoRound(str(source), scheme="W4A16", model_free=True, device_map=arguments.device)
    return lambda: compressor.quantize_and_save(output_dir=str(out), format="auto_round")


def sync_all(out: Path) -> None:
    """Waits until the result is on disk; nothing is left to do for those that call fsync themselves."""
    for path in out.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def memory_now() -> int:
    """Resident bytes without file pages, having reset the kernel's record of the peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("RssAnon") + status("RssShmem")


def memory_peak() -> int:
    """Peak resident bytes since `memory_now`, without mapped files."""
    return status("VmHWM") - status("RssFile")


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def can_drop_caches() -> bool:
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


if __name__ == "__main__":
    main()
