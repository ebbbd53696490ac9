"""Is the MTP module any good? Its drafts over given tokens, against what the main model then predicts.

As in greedy speculative decoding: after token t the main model predicts token t + 1, and the module drafts
token t + 2 from the main model's hidden state and token t + 1; the draft is accepted if it is what the main
model predicts in its next step. Further drafts come from the module's later layers, or from the last one on
its own hidden states. The tokens are the given ones throughout, so that all positions are computed at once.

Shape suffixes: B sequences, L tokens of a sequence.
"""
# ruff: noqa: N803 (shape suffixes are capitals)

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import Source, SourceLike, parse_source
from dsv3_tools.conversion.devices import resolve_devices
from dsv3_tools.conversion.progress import Meter, Progress, Stop
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.errors import UsageError
from dsv3_tools.model.tokenizer import TOKENIZER_FILES
from dsv3_tools.model.tokens import read_tokens
from dsv3_tools.verify.devices import COMPUTE_DTYPES, default_dtype, run_on
from dsv3_tools.verify.mtp_run import Drafts, MtpRequest, draft

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DraftResult", "MtpReport", "verify_mtp"]

MIN_ACCEPTANCE = 0.25
"""Far below what a released module reaches on text (0.6 to 0.9), far above one with wrong weights."""


@dataclass(frozen=True)
class DraftResult:
    """The module's draft number `number` after every position.

    Attributes:
        number: from 1.
        layer: number of the MTP layer that makes it.
        is_repeated: whether that layer works on hidden states of its own.
        acceptance: share of positions where it is the main model's own first choice.
        joint_acceptance: share where this and all drafts before it are: how often it would be used.
        accuracy: share where it is the given token.
        loss: of the given tokens, in nats.
        num_positions: how many there are.
    """

    number: int
    layer: int
    is_repeated: bool
    acceptance: float
    joint_acceptance: float
    accuracy: float
    loss: float
    num_positions: int


@dataclass(frozen=True)
class MtpReport:
    """How a module's drafts fare.

    Attributes:
        directory: the main model's checkpoint.
        module: the MTP module's; the same, if it has its own.
        tokens: where the tokens are from, and how many.
        devices: what computed, one for each rank.
        dtype: type of arithmetic.
        loss: the main model's, of the given tokens, in nats.
        accuracy: share of positions where its first choice is the given token.
        chance: the acceptance that a draft would have which is always the most frequent first choice.
        drafts: in their order.
        expected_tokens: per number of drafts, from 1, the tokens that a step of the main model yields on
            average: 1 and the joint acceptances.
        min_acceptance: what the first draft had to reach.
        problems: what it did not.
        seconds: the whole run took.
    """

    directory: Source
    module: Source
    tokens: str
    devices: tuple[str, ...]
    dtype: str
    loss: float
    accuracy: float
    chance: float
    drafts: tuple[DraftResult, ...]
    expected_tokens: tuple[float, ...]
    min_acceptance: float
    problems: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_mtp(
    source: SourceLike,
    *,
    mtp: SourceLike | None = None,
    drafts: int = 3,
    min_acceptance: float = MIN_ACCEPTANCE,
    tokens: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
) -> MtpReport:
    """Measures how often the MTP module's drafts would be accepted.

    Example:
        >>> report = verify_mtp("miniature/checkpoint", drafts=1, device="cpu", length=64, max_tokens=512)
        >>> report.passed, report.drafts[0].acceptance > 2 * report.chance
        (True, True)

    Args:
        source: a checkpoint with the main model.
        mtp: one with the MTP module, under its own names or exported as layer 0; None is `source`.
        drafts: how many tokens to draft after each position.
        min_acceptance: least acceptance of the first draft, from 0 to 1.
        tokens: `.npy` or `.safetensors` file of token ids, `[tokens]` or `[sequences, tokens]`.
        text: UTF-8 file, for the checkpoint's tokenizer; without either, a text that comes along.
        length: tokens of a sequence; None is 512, or whole rows of `tokens`.
        max_tokens: of all sequences; None is all that there are.
        device: "auto", "cpu", "cuda", or "cuda:0,1"; several are ranks that share heads and experts.
        dtype: type of arithmetic, "F32" or "BF16"; None is BF16 on GPUs and F32 on a CPU.
        on_progress: called after every layer.
        stop: lets a signal handler end it.

    Returns:
        The findings; an acceptance that is too low is a finding, not an exception.

    Raises:
        UsageError: options that make no sense.
        CheckpointError: no MTP module, one of another model, or tokens that the model does not have.
    """
    began = time.monotonic()
    _check_options(drafts, min_acceptance, dtype)
    with Checkpoint(source) as checkpoint:
        given = read_tokens(
            checkpoint.folder_of(TOKENIZER_FILES),
            tokens=None if tokens is None else Path(tokens),
            text=None if text is None else Path(text),
            length=length,
            max_tokens=max_tokens,
            vocab_size=checkpoint.config.vocab_size,
        )
        module = None if mtp is None else parse_source(mtp)
        num_layers, nbytes = checkpoint.config.num_hidden_layers, checkpoint.nbytes
    if given.batch_BL.shape[1] < drafts + 2:
        raise UsageError(
            f"--drafts {drafts}: sequences of {given.batch_BL.shape[1]} tokens leave no position to judge "
            f"them, expected at least {drafts + 2}"
        )
    ranks = Ranks.join()
    devices = resolve_devices(device, ranks)
    dtype = dtype or default_dtype(devices)
    meter = Meter(nbytes, num_layers, on_progress)
    request = MtpRequest(checkpoint.source, module, given.batch_BL, dtype, drafts)
    found = run_on(
        devices, draft, request, lambda _: meter.add(nbytes // num_layers, shards=1), stop or Stop()
    )
    results, expected = _results(found, given.batch_BL)
    problems = tuple(_problems(results[0], min_acceptance))
    main_choice = found.main_choice_BL[:, :-1]
    return MtpReport(
        directory=checkpoint.source,
        module=module or checkpoint.source,
        tokens=given.source,
        devices=tuple(devices * ranks.world_size),
        dtype=dtype,
        loss=float(found.main_loss_BL[:, :-1].mean()),
        accuracy=float((main_choice == given.batch_BL[:, 1:]).double().mean()),
        chance=float(main_choice.flatten().bincount().max() / main_choice.numel()),
        drafts=results,
        expected_tokens=expected,
        min_acceptance=min_acceptance,
        problems=problems,
        seconds=time.monotonic() - began,
    )


def _check_options(drafts: int, min_acceptance: float, dtype: str | None) -> None:
    if drafts < 1:
        raise UsageError(f"--drafts: got {drafts}, expected at least 1")
    if not 0 <= min_acceptance <= 1:
        raise UsageError(f"--min-acceptance: got {min_acceptance:g}, expected a number from 0 to 1")
    if dtype not in (None, *COMPUTE_DTYPES):
        raise UsageError(f"--dtype {dtype}: expected {' or '.join(COMPUTE_DTYPES)}")


def _results(found: Drafts, tokens_BL: Tensor) -> tuple[tuple[DraftResult, ...], tuple[float, ...]]:
    """Returns the figures of every draft, of positions that have all tokens, and the expected tokens."""
    results, expected = [], []
    total = 1.0
    all_right = None
    for number, step in enumerate(found.steps, 1):
        positions = tokens_BL.shape[1] - 1 - number  # the drafted token is one of the given
        choice, target = step.choice_BL[:, :positions], tokens_BL[:, number + 1 :]
        right = choice == found.main_choice_BL[:, number:-1]
        all_right = right if all_right is None else all_right[:, :positions] & right
        total += float(all_right.double().mean())
        expected.append(total)
        results.append(
            DraftResult(
                number=number,
                layer=step.layer,
                is_repeated=step.is_repeated,
                acceptance=float(right.double().mean()),
                joint_acceptance=float(all_right.double().mean()),
                accuracy=float((choice == target).double().mean()),
                loss=float(step.loss_BL[:, :positions].mean()),
                num_positions=right.numel(),
            )
        )
    return tuple(results), tuple(expected)


def _problems(first: DraftResult, min_acceptance: float) -> Sequence[str]:
    if first.acceptance >= min_acceptance:
        return ()
    return (
        f"MTP layer {first.layer}: {100 * first.acceptance:.2f} % of its drafts are accepted, expected at "
        f"least {100 * min_acceptance:.4g} %: its weights are not those of this model, or wrong",
    )
