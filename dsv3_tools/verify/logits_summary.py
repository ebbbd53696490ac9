"""The worst tokens, and errors by layer and place, from what every token has shown.

Shape suffixes: T tokens.
"""
# ruff: noqa: N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsv3_tools.model.tokens import Tokens
from dsv3_tools.verify.hidden_errors import ratio
from dsv3_tools.verify.logits_results import HeatMap, WorstToken
from dsv3_tools.verify.logits_run import HeadFindings
from dsv3_tools.verify.metrics import COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["heat_map", "worst_tokens"]

_NUM_WORST = 20
_CONTEXT_TOKENS = 24
_NUM_COLUMNS = 128


def worst_tokens(head: HeadFindings, tokens: Tokens) -> tuple[WorstToken, ...]:
    """Returns the positions with the largest KL(reference || candidate), routes replayed; none that are 0."""
    table = head.tables["replayed"]
    kl_T = table[:, COLUMNS.index("kl")].nan_to_num(float("inf"))
    order = kl_T.argsort(descending=True, stable=True)[:_NUM_WORST].tolist()
    return tuple(_worst(head, tokens, place) for place in order if kl_T[place] > 0)


def _worst(head: HeadFindings, tokens: Tokens, place: int) -> WorstToken:
    sequence, position = divmod(place, tokens.batch_BL.shape[1])
    found = dict(zip(COLUMNS, head.tables["replayed"][place].tolist(), strict=True))
    before = tokens.batch_BL[sequence, max(0, position + 1 - _CONTEXT_TOKENS) : position + 1]
    return WorstToken(
        sequence=sequence,
        position=position,
        kl=found["kl"],
        context=_text(tokens, before.tolist()),
        reference=_text(tokens, [int(head.best_T[place])]),
        reference_probability=float(head.probability_T[place]),
        candidate=_text(tokens, [int(found["token"])]),
        candidate_probability=found["probability"],
    )


def _text(tokens: Tokens, ids: list[int]) -> str:
    return " ".join(map(str, ids)) if tokens.tokenizer is None else tokens.tokenizer.decode(ids)


def heat_map(errors: Sequence[tuple[Tensor, Tensor]]) -> HeatMap:
    """Returns relative errors over stretches of tokens.

    Args:
        errors: per layer, one at least, each token's squared error and squared hidden state.
    """
    num_tokens = len(errors[0][0])
    num_columns = min(num_tokens, _NUM_COLUMNS)
    starts = [num_tokens * column // num_columns for column in range(num_columns)]
    stretches = [slice(*pair) for pair in zip(starts, [*starts[1:], num_tokens], strict=True)]
    rows = (
        tuple(ratio(error_T[stretch], signal_T[stretch]) for stretch in stretches)
        for error_T, signal_T in errors
    )
    return HeatMap(tuple(range(len(errors))), tuple(starts), tuple(rows))
