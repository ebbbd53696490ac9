"""What each format costs in quality, on the shipped model: held-out loss, KL divergence, weight SNR, size.

    python benchmarks/quality.py                         prints the table
    python benchmarks/quality.py --readme README.md      and puts it between the marks there

Every format is made by its command from the shipped FP8 checkpoint and decoded by ours. The model then runs
in float32 on the CPU, in transformers' own implementation, over the 64 held-out excerpts of 256 tokens
(`miniature/heldout_tokens.safetensors`). KL is that of the next-token distribution of the FP8 weights, in
float32, to the format's, whose weights are rounded to BF16 as engines do; in float64, mean over tokens. So
the row of BF16 is what rounding alone costs. SNR is over the weights that the format quantizes, in float32,
against the FP8 checkpoint's. Size is that of the tensors; of a real DeepSeek-V3 97 % are routed experts, of
this model 63 %.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

import dsv3_tools
from dsv3_tools.formats.stored import find_weights, read_formats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from miniature.data import BOS_ID, read_corpus  # noqa: E402
from miniature.export import from_released  # noqa: E402
from miniature.model import evaluate, predict  # noqa: E402

CALIBRATION_TOKENS = 512 * 256
SOURCE = ROOT / "miniature" / "checkpoint"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"

Make = Callable[[Path], Any]


def _int8(**options: Any) -> Make:
    return lambda out: dsv3_tools.quantize_int8(SOURCE, out, device="cpu", **options)


def _int4(**options: Any) -> Make:
    return lambda out: dsv3_tools.quantize_int4(SOURCE, out, device="cpu", **options)


def _calibrated(method: str, **options: Any) -> Make:
    def make(out: Path) -> None:
        _int4(method=method, calibration=calibration_file(), length=256, **options)(out)

    return make


@lru_cache(maxsize=1)
def calibration_file() -> Path:
    """Returns 512 x 256 token ids of what the model was trained on: nothing that is held out."""
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    texts = list(read_corpus().train)
    random.Random(0).shuffle(texts)
    ids: list[int] = []
    for text in texts:
        ids += [BOS_ID, *tokenizer.encode(text, add_special_tokens=False).ids[:4096]]
        if len(ids) >= CALIBRATION_TOKENS:
            break
    path = Path(tempfile.mkdtemp()) / "calibration.npy"
    np.save(path, np.array(ids[:CALIBRATION_TOKENS], np.int32).reshape(-1, 256))
    return path


FORMATS: dict[str, Make | None] = {
    "FP8 blocks (as released)": None,
    "BF16": lambda out: dsv3_tools.convert_fp8_to_bf16(SOURCE, out, device="cpu"),
    "INT8 blocks": _int8(scheme="block"),
    "INT8 channels": _int8(scheme="channel"),
    "INT4 g128, absmax": _int4(scale_search="absmax"),
    "INT4 g128, MSE": _int4(),
    "INT4 g128, weighted": _calibrated("rtn-weighted"),
    "INT4 g128, GPTQ": _calibrated("gptq"),
    "INT4 g64, MSE": _int4(group_size=64),
    "INT4 g32, MSE": _int4(group_size=32),
    "INT4 g32, MSE, asymmetric": _int4(group_size=32, symmetric=False),
}
"""What the table has, each from the command of the same options."""


class Row(NamedTuple):
    """Measurements of one format."""

    name: str
    nbytes: int
    snr: float
    loss: float
    kl: float
    acceptance: float


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", type=Path, help="a file with the two marks to write the table between")
    arguments = parser.parse_args()
    text = table(measure())
    print(text)
    if arguments.readme is not None:
        readme = arguments.readme.read_text(encoding="utf-8")
        before, after = readme.index(BEGIN) + len(BEGIN), readme.index(END)
        arguments.readme.write_text(f"{readme[:before]}\n{text}\n{readme[after:]}", encoding="utf-8")


def measure() -> list[Row]:
    """Returns a row for each of `FORMATS`."""
    tokens = load_file(ROOT / "miniature" / "heldout_tokens.safetensors")["tokens"].long()
    original = decode(SOURCE, "F32")
    reference = log_probabilities(original, tokens)
    rows = []
    for name, make in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            if make is not None:
                make(Path(folder))
            directory = SOURCE if make is None else Path(folder)
            weights = original if make is None else decode(directory, "BF16")
            found = evaluate(*from_released(weights), tokens)
            rows.append(
                Row(
                    name,
                    dsv3_tools.inspect(directory).nbytes,
                    snr(original, directory),
                    found["loss"],
                    divergence(reference, log_probabilities(weights, tokens)),
                    found["mtp_acceptance"],
                )
            )
    return rows


def decode(directory: Path, dtype: str) -> dict[str, Tensor]:
    """Returns every tensor of the model, weights decoded to `dtype`."""
    weights = {}
    with dsv3_tools.Checkpoint(directory) as checkpoint:
        formats = read_formats(checkpoint.config_json, "config.json")
        for weight in find_weights(checkpoint.specs, formats).weights:
            parts = {part: checkpoint.read(name) for part, name in weight.parts.items()}
            quantized = weight.format.scale_part is not None
            weights[weight.full_name] = (
                weight.format.decode(parts, dtype=dtype) if quantized else parts["weight"]
            )
    return weights


def snr(original: dict[str, Tensor], directory: Path) -> float:
    """Returns the ratio of signal to error, in dB, over the weights that are quantized otherwise than FP8."""
    found = decode(directory, "F32")
    with dsv3_tools.Checkpoint(directory) as checkpoint:
        stored = find_weights(checkpoint.specs, read_formats(checkpoint.config_json, "config.json"))
    names = [w.full_name for w in stored.weights if w.format.scale_part is not None]
    names = names or [name for name in original if name.endswith("_proj.weight")]
    signal = sum(float(original[name].double().square().sum()) for name in names)
    error = sum(float((original[name].double() - found[name].double()).square().sum()) for name in names)
    return math.inf if error == 0 else 10 * math.log10(signal / error)


@torch.no_grad()
def log_probabilities(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Returns the main model's log probabilities `[tokens, vocabulary]` in float64."""
    model, mtp = from_released(weights)
    logits = [predict(model, mtp, rows)[0] for rows in tokens.split(16)]
    return torch.cat(logits).double().log_softmax(-1).flatten(0, 1)


def divergence(reference: Tensor, candidate: Tensor) -> float:
    """Returns KL(reference || candidate) in nats, mean over tokens."""
    return float((reference.exp() * (reference - candidate)).sum(-1).mean())


def table(rows: list[Row]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| format | size | weight SNR | held-out loss | KL to the released weights | MTP acceptance |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "exact" if math.isinf(row.snr) else f"{row.snr:.1f} dB"
        lines.append(
            f"| {row.name} | {row.nbytes / 1e6:.1f} MB | {ratio} | {row.loss:.4f} | {max(row.kl, 0.0):.5f} | "
            f"{row.acceptance:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
