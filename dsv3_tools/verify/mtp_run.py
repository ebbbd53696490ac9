"""One rank's work of judging an MTP module: the main model once, then one draft after the other.

Shape suffixes: B sequences, L tokens of a sequence, T = B x L, V vocabulary.
"""
# ruff: noqa: N803, N806, N815 (shape suffixes are capitals)

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import Source
from dsv3_tools.errors import CheckpointError
from dsv3_tools.model.head import Head
from dsv3_tools.model.launch import Report
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.model.transformer import Transformer
from dsv3_tools.verify.metrics import chunk_size, following

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DraftStep", "Drafts", "MtpRequest", "draft"]


@dataclass(frozen=True)
class MtpRequest:
    """What to run: the same in every rank. `module` is the MTP module's checkpoint, if it has its own."""

    source: Source
    module: Source | None
    tokens_BL: Tensor
    dtype: str
    num_drafts: int


@dataclass
class DraftStep:
    """One draft after every position that knows its next tokens.

    Attributes:
        layer: the MTP layer's number.
        is_repeated: whether it worked on hidden states of its own.
        choice_BL: the most likely token.
        loss_BL: of the given token, 0 where there is none.
    """

    layer: int
    is_repeated: bool
    choice_BL: Tensor
    loss_BL: Tensor


@dataclass
class Drafts:
    """The main model's first choice and loss at every position, and the drafts."""

    main_choice_BL: Tensor
    main_loss_BL: Tensor
    steps: list[DraftStep]


def draft(ranks: RankGroup, device: str, report: Report, request: MtpRequest) -> Drafts:
    """Runs the model and its module; reports the number of every layer of the main model that is done.

    Raises:
        CheckpointError: there is no MTP module, or it is one for another model.
    """
    tokens_BL = request.tokens_BL
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(request.source))
        module = None if request.module is None else stack.enter_context(Checkpoint(request.module))
        model = Transformer(
            checkpoint, module=module, device=device, dtype=request.dtype, through_bf16=True, ranks=ranks
        )
        num_layers = len(model.mtp_layers)
        if not num_layers:
            raise CheckpointError(
                f"{request.source}: there is no MTP module (num_nextn_predict_layers is "
                f"{model.settings.dims.num_nextn_predict_layers}); --mtp takes one from another directory"
            )
        model.check()
        hidden_BLD = model.embed(tokens_BL)
        for number, layer in model.layers():
            hidden_BLD, _ = layer.forward(hidden_BLD)
            if ranks.rank == 0:
                report(number)
        found = Drafts(*_choices(model, model.head(), hidden_BLD, following(tokens_BL, 1)), [])
        for place in range(request.num_drafts):
            mtp = model.mtp(min(place, num_layers - 1), is_repeated=place >= num_layers)
            hidden_BLD, _ = mtp.forward(hidden_BLD[:, :-1], tokens_BL[:, place + 1 :])
            targets_BL = following(tokens_BL, place + 2)[:, : hidden_BLD.shape[1]]
            choice_BL, loss_BL = _choices(model, mtp.head(), hidden_BLD, targets_BL)
            found.steps.append(DraftStep(mtp.number, place >= num_layers, choice_BL, loss_BL))
        return found


def _choices(model: Transformer, head: Head, hidden_BLD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the most likely token at every position, and the loss of `targets_BL`, on the CPU."""
    import torch
    from torch.nn.functional import cross_entropy

    ranks, size = model.ranks, chunk_size(model.settings.dims.vocab_size)
    hidden_TD, targets_T = hidden_BLD.flatten(0, 1), targets_BL.flatten().to(model.device)
    table_T2 = torch.zeros((len(targets_T), 2), dtype=torch.float64, device=model.device)
    for start in range(ranks.rank * size, len(targets_T), ranks.world_size * size):
        rows = slice(start, start + size)
        logits_TV = head.logits(hidden_TD[rows])
        loss_T = cross_entropy(logits_TV, targets_T[rows], ignore_index=-1, reduction="none")
        table_T2[rows] = torch.stack((logits_TV.argmax(1).double(), loss_T.double()), dim=1)
    choice_T, loss_T = ranks.sum_(table_T2).cpu().unbind(1)
    return choice_T.long().view(targets_BL.shape), loss_T.view(targets_BL.shape)
