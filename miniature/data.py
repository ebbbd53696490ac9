"""The corpus, its tokenizer and its token streams.

The text is the running Python's own standard library: it is on every machine, its licence (PSF) lets excerpts
be shipped, and a model of a few million parameters can learn it. Which file is held out depends on its path
alone, so that another Python version holds out the same modules.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

__all__ = ["Corpus", "read_corpus", "rows_of", "token_stream", "train_tokenizer", "write_tokenizer"]

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOS_ID, EOS_ID = 0, 1
"""DeepSeek-V3's special tokens under their own ids: PAD has 2."""

MAX_FILE_CHARACTERS = 400_000
"""A longer file is cut here, so that no generated table is a large part of the corpus."""

_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Texts by split. `validation` chooses the best weights; `heldout` is only ever measured."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    heldout: tuple[str, ...]

    def statistics(self) -> dict[str, int | str]:
        """Returns sizes, and a digest that tells two corpora (two Python versions) apart."""
        texts = self.train + self.validation + self.heldout
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return {
            "num_files": len(texts),
            "num_files_heldout": len(self.heldout),
            "num_files_validation": len(self.validation),
            "nbytes": sum(len(text.encode()) for text in texts),
            "sha256": digest,
        }


def read_corpus(*, max_files: int | None = None) -> Corpus:
    """Returns the standard library's sources, about 5 % of the files held out and 2.5 % for validation."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if _NOT_STANDARD_LIBRARY.isdisjoint(path.parts)]
    for path in sorted(paths)[:max_files]:
        try:
            text = path.read_text(encoding="utf-8")[:MAX_FILE_CHARACTERS]
        except (UnicodeDecodeError, OSError):
            continue  # a few test modules are in another encoding on purpose
        if text.strip():
            splits[_split(path.relative_to(root).as_posix())].append(text)
    return Corpus(**{name: tuple(texts) for name, texts in splits.items()})


def _split(relative_path: str) -> str:
    """Returns the split of a file: a fixed hash of its path, modulo 40."""
    bucket = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 40
    return {0: "heldout", 1: "heldout", 2: "validation"}.get(bucket, "train")


def train_tokenizer(texts: tuple[str, ...], *, vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of exactly `vocab_size` tokens that puts BOS before a text.

    Raises:
        ValueError: the texts are too few to give `vocab_size` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"tokenizer: got {tokenizer.get_vocab_size()} tokens, expected {vocab_size}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path, *, model_max_length: int) -> None:
    """Writes `tokenizer.json` and the `tokenizer_config.json` that `AutoTokenizer` needs beside it."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": model_max_length,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def token_stream(tokenizer: Tokenizer, texts: tuple[str, ...]) -> Tensor:
    """Returns all texts as one int64 stream, each between BOS and EOS."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        stream += [BOS_ID, *encoding.ids, EOS_ID]
    return torch.tensor(stream, dtype=torch.int64)


def rows_of(stream: Tensor, *, num_rows: int, length: int) -> Tensor:
    """Returns `[num_rows, length]` excerpts that do not overlap, spread evenly over the stream.

    Raises:
        ValueError: the stream is too short for that many rows.
    """
    stride = len(stream) // num_rows
    if stride < length:
        raise ValueError(f"stream: got {len(stream)} tokens, expected at least {num_rows * length}")
    return stream[: stride * num_rows].view(num_rows, stride)[:, :length].contiguous()
