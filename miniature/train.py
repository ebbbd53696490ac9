"""Trains the miniature model, exports it in the released FP8 layout and measures what was exported.

    python3 -m miniature.train --out DIR [--minutes 5] [--pack FILE.tar]     from the repository's root

Each number in `--epochs` is one whole training with its own cosine schedule, from the same seed; the best
weights seen on the validation rows of any of them are exported. `--minutes` bounds the whole program: the
first schedule is squeezed into what time there is, a later one starts only if it is expected to fit.

Writes `DIR/checkpoint/`, `DIR/heldout_tokens.safetensors` and `DIR/training.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from miniature.data import read_corpus, rows_of, token_stream, train_tokenizer, write_tokenizer
from miniature.export import (
    decode,
    encode,
    from_released,
    read_checkpoint,
    released_weights,
    write_bf16_checkpoint,
    write_checkpoint,
    write_json,
)
from miniature.model import CONFIG, MtpLayer, RouterLoad, build, evaluate, losses, prepare_for_training

MAX_NBYTES = 16_000_000
"""What the whole output may take: it is shipped inside the repository."""

MAX_LOGIT_DIFFERENCE = 1e-4
"""Between two ways to load the export: float32, sums of at most 512 terms, logits under about 30."""


@dataclass(frozen=True)
class Settings:
    """One training. `rows` x `length` tokens a step."""

    epochs: float = 8.0
    rows: int = 64
    length: int = 512
    peak_lr: float = 2e-3
    final_lr: float = 2e-5
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    warmup_steps: int = 100
    mtp_weight: float = 0.3
    bias_step: float = 1e-3
    eval_interval: int = 100
    validation_rows: int = 128
    heldout_rows: int = 64
    heldout_length: int = 257
    reserve_seconds: float = 60.0
    max_files: int | None = None
    seed: int = 20250801


SMOKE = Settings(
    epochs=1e-3, rows=2, length=64, warmup_steps=2, eval_interval=4, validation_rows=2, heldout_rows=4,
    reserve_seconds=5.0, max_files=400,
)  # fmt: skip


@dataclass
class Best:
    """The best weights seen on the validation rows, and the training that they come from."""

    loss: float = math.inf
    model: dict[str, Tensor] = field(default_factory=dict)
    mtp: dict[str, Tensor] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def offer(self, model: nn.Module, mtp: nn.Module, loss: float, training: dict[str, Any]) -> None:
        """Keeps a copy of the weights if `loss` is the lowest so far; NaN never is."""
        if loss < self.loss:
            self.loss, self.training = loss, training
            self.model = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.mtp = {name: tensor.clone() for name, tensor in mtp.state_dict().items()}

    def released(self) -> dict[str, Tensor]:
        """Returns these weights under their released names, rounded to BF16."""
        model, mtp = build()
        model.load_state_dict(self.model)
        mtp.load_state_dict(self.mtp)
        return released_weights(model, mtp)


def train(settings: Settings, stream: Tensor, validation: Tensor, *, deadline: float, best: Best) -> None:
    """Trains once and offers the weights to `best` every `eval_interval` steps and at the end."""
    torch.manual_seed(settings.seed)
    device = stream.device
    model, mtp = build()
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` and loses its signature
    mtp.to(device)
    prepare_for_training(model, mtp)
    load = RouterLoad(model, mtp)
    optimizer = _optimizer(settings, model, mtp)
    generator = torch.Generator().manual_seed(settings.seed)
    tokens_per_step = settings.rows * settings.length
    num_steps = max(1, round(settings.epochs * len(stream) / tokens_per_step))
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        lr = _learning_rate(settings, step, progress)
        batch = _batch(settings, stream, generator)
        main_loss, mtp_loss = _optimize(settings, model, mtp, optimizer, batch, lr=lr)
        step += 1
        elapsed = time.monotonic() - start
        progress = max(step / num_steps, elapsed / max(deadline - start, 1.0))
        # As in DeepSeek-V3 the bias is left alone at the end, so that the last weights fit it.
        load.update_bias(settings.bias_step if progress < 0.9 else 0.0)
        if step % settings.eval_interval == 0 or progress >= 1.0:
            scores = _validate(model, mtp, validation)
            load.reset()
            training = {"epochs": settings.epochs, "steps": step, "tokens": step * tokens_per_step}
            best.offer(model, mtp, scores["loss"], training)
            _log(
                f"epochs {settings.epochs:g} step {step}/{num_steps} {elapsed:.0f} s lr {lr:.1e} "
                f"train {main_loss.item():.3f} mtp {mtp_loss.item():.3f} | validation {scores['loss']:.4f} "
                f"mtp {scores['mtp_loss']:.4f} accepted {scores['mtp_acceptance']:.3f}"
            )


def _optimizer(settings: Settings, model: nn.Module, mtp: nn.Module) -> torch.optim.Optimizer:
    parameters = [*model.parameters(), *mtp.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def _learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Returns a cosine from `peak_lr` to `final_lr` over `progress` in [0, 1], after a linear warm-up."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    lr = settings.final_lr + (settings.peak_lr - settings.final_lr) * cosine
    return lr * min(1.0, (step + 1) / settings.warmup_steps)


def _batch(settings: Settings, stream: Tensor, generator: torch.Generator) -> Tensor:
    """Returns `[rows, length + 1]` excerpts from random places of the stream."""
    last = len(stream) - settings.length - 1
    starts = torch.randint(last + 1, (settings.rows, 1), generator=generator).to(stream.device)
    return stream[starts + torch.arange(settings.length + 1, device=stream.device)]


def _optimize(
    settings: Settings,
    model: DeepseekV3ForCausalLM,
    mtp: MtpLayer,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    *,
    lr: float,
) -> tuple[Tensor, Tensor]:
    """Makes one step and returns both losses, still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    mtp.train()
    with _fast(batch.device):
        main_loss, mtp_loss = losses(model, mtp, batch)
    (main_loss + settings.mtp_weight * mtp_loss).backward()
    torch.nn.utils.clip_grad_norm_([*model.parameters(), *mtp.parameters()], settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return main_loss.detach(), mtp_loss.detach()


def _validate(model: DeepseekV3ForCausalLM, mtp: MtpLayer, tokens: Tensor) -> dict[str, float]:
    model.eval()
    mtp.eval()
    with _fast(tokens.device):
        return evaluate(model, mtp, tokens, rows_at_once=64)


@contextlib.contextmanager
def _fast(device: torch.device) -> Iterator[None]:
    """Autocast to BF16; attention by the kernels that take heads of 96 (q, k) and 64 (v) dimensions."""
    with torch.autocast(device.type, dtype=torch.bfloat16), contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]))
        yield


def train_all(
    settings: Settings, epochs: list[float], stream: Tensor, validation: Tensor, *, deadline: float
) -> Best:
    """Trains with each number of epochs that fits before `deadline` and returns the best weights."""
    best, seconds_per_epoch = Best(), 0.0
    for number in epochs:
        start = time.monotonic()
        if start + seconds_per_epoch * number > deadline:
            _log(f"epochs {number:g}: left out, no time")
            continue
        train(replace(settings, epochs=number), stream, validation, deadline=deadline, best=best)
        seconds_per_epoch = (time.monotonic() - start) / number
    if not best.training:
        raise RuntimeError("training: no finite validation loss, nothing to export")
    return best


def measure(checkpoint: Path, master: dict[str, Tensor], heldout: Tensor) -> dict[str, Any]:
    """Returns how the exported checkpoint and its BF16 master do on `heldout`, and whether the export loads.

    All in float32 on the CPU with transformers' own experts, so that anyone can compute it again.
    """
    report: dict[str, Any] = {"evaluation": "float32 on CPU, transformers, experts_implementation eager"}
    report["heldout_bf16_master"] = evaluate(*from_released(master), heldout)
    weights = decode(read_checkpoint(checkpoint))
    model, mtp = from_released(weights)
    load = RouterLoad(model, mtp)
    report["heldout_fp8"] = evaluate(model, mtp, heldout)
    report["router_max_violation"] = load.max_violation()
    report["parameters"] = _count_parameters(weights)
    report["max_logit_difference"] = _difference_from_transformers(model, weights, heldout[:2, :-1])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "def add(a, b):\n    return a + b  # \N{GREEK SMALL LETTER PI}\n"
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    report["tokenizer_round_trip"] = decoded == text
    return report


def problems(report: dict[str, Any], directory: Path) -> list[str]:
    """Returns what is wrong with the output, in one line each."""
    nbytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    difference = report["max_logit_difference"]
    found = {
        f"size: got {nbytes} bytes, expected at most {MAX_NBYTES}": nbytes > MAX_NBYTES,
        f"logits: differ from from_pretrained's by {difference}": not difference <= MAX_LOGIT_DIFFERENCE,
        "tokenizer: AutoTokenizer does not decode what it encoded": not report["tokenizer_round_trip"],
    }
    return [text for text, wrong in found.items() if wrong]


@torch.no_grad()
def _difference_from_transformers(
    model: DeepseekV3ForCausalLM, weights: dict[str, Tensor], tokens: Tensor
) -> float:
    """Returns the largest difference of logits from a model that `from_pretrained` makes of `weights`."""
    with tempfile.TemporaryDirectory() as directory:
        write_bf16_checkpoint(weights, Path(directory))
        other = DeepseekV3ForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
        ).eval()
        logits = other(input_ids=tokens, use_cache=False).logits
    return (logits - model(input_ids=tokens, use_cache=False).logits).abs().max().item()


def _count_parameters(weights: dict[str, Tensor]) -> dict[str, int]:
    """Returns parameters by part; `active` is what one token uses in the main model."""
    mtp_prefix = f"model.layers.{CONFIG['num_hidden_layers']}."
    main = {name: weight.numel() for name, weight in weights.items() if not name.startswith(mtp_prefix)}
    routed = sum(numel for name, numel in main.items() if ".mlp.experts." in name)
    active_share = CONFIG["num_experts_per_tok"] / CONFIG["n_routed_experts"]
    total = sum(weight.numel() for weight in weights.values())
    return {
        "main": sum(main.values()),
        "main_active": sum(main.values()) - round(routed * (1 - active_share)),
        "mtp_layer_with_copies": total - sum(main.values()),
        "total": total,
    }


def pack(directory: Path, file: Path) -> None:
    """Packs `directory` into one uncompressed tar, without the owner and the times of its files."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                archive.add(path, arcname=path.relative_to(directory), filter=plain)


def _versions() -> dict[str, str]:
    modules = (torch, transformers, tokenizers, safetensors)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {module.__name__: module.__version__ for module in modules}
    return {"python": platform.python_version(), **versions, "trained_on": device}


def _log(text: str) -> None:
    print(text, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="must not exist or be empty")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the whole program, start to end")
    parser.add_argument("--epochs", type=float, nargs="+", default=[8, 16, 4, 32], help="schedules to try")
    parser.add_argument("--pack", type=Path, metavar="FILE.tar", help="also pack DIR into one tar")
    parser.add_argument("--smoke", action="store_true", help="a few steps on the CPU, to test the script")
    return parser.parse_args()


def _data(settings: Settings) -> tuple[Tokenizer, Tensor, Tensor, Tensor, dict[str, Any]]:
    """Returns the tokenizer, the training stream, validation and held-out rows, and statistics."""
    corpus = read_corpus(max_files=settings.max_files)
    tokenizer = train_tokenizer(corpus.train, vocab_size=CONFIG["vocab_size"])
    stream = token_stream(tokenizer, corpus.train)
    length = settings.heldout_length
    validation_stream = token_stream(tokenizer, corpus.validation)
    heldout_stream = token_stream(tokenizer, corpus.heldout)
    validation_rows = min(settings.validation_rows, len(validation_stream) // length)
    validation = rows_of(validation_stream, num_rows=validation_rows, length=length)
    heldout = rows_of(heldout_stream, num_rows=settings.heldout_rows, length=length)
    statistics = {
        **corpus.statistics(),
        "num_tokens_train": len(stream),
        "num_tokens_validation": len(validation_stream),
        "num_tokens_heldout": len(heldout_stream),
    }
    return tokenizer, stream, validation, heldout, statistics


def main() -> None:
    """Trains, exports, measures, packs; packs what there is also if measuring fails."""
    start, arguments = time.monotonic(), _arguments()
    out: Path = arguments.out
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"--out: {out} is not empty")
    settings = SMOKE if arguments.smoke else Settings()
    epochs = [settings.epochs] if arguments.smoke else arguments.epochs
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.smoke else "cpu")
    tokenizer, stream, validation, heldout, statistics = _data(settings)
    _log(f"{time.monotonic() - start:.0f} s: {statistics}")

    deadline = start + 60 * arguments.minutes - settings.reserve_seconds
    best = train_all(settings, epochs, stream.to(device), validation.to(device), deadline=deadline)
    master = best.released()

    checkpoint = out / "checkpoint"
    checkpoint.mkdir(parents=True)
    write_tokenizer(tokenizer, checkpoint, model_max_length=CONFIG["max_position_embeddings"])
    write_checkpoint(encode(master), checkpoint)
    heldout_file = out / "heldout_tokens.safetensors"
    save_file({"tokens": heldout.to(torch.int32)}, heldout_file, metadata={"format": "pt"})
    heldout_file.chmod(0o644)

    report = {"seed": settings.seed, **best.training, "validation_loss": best.loss}
    report |= {"corpus": statistics, "versions": _versions()}
    try:
        report |= measure(checkpoint, master, heldout)
    finally:
        report["seconds"] = round(time.monotonic() - start)
        write_json(report, out / "training.json")
        if arguments.pack:
            pack(out, arguments.pack)
        _log((out / "training.json").read_text(encoding="utf-8"))
    if found := problems(report, out):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
