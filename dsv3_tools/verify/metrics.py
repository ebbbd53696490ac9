"""How far one model's logits are from another's, token by token, in float64.

KL divergences are sums over the whole vocabulary of float64 probabilities; nothing is averaged over it.

Shape suffixes: T tokens, V vocabulary.
"""
# ruff: noqa: N803, N806, N815 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from dsv3_tools.verify.logits_results import Divergence, Histogram

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "COLUMNS",
    "Reference",
    "chunk_size",
    "compare",
    "divergence",
    "following",
    "histogram",
    "perplexity",
]

_ELEMENTS_AT_ONCE = 1 << 25  # 256 MB in float64
_EDGES = tuple(10.0 ** (k / 3) for k in range(-30, 4))

COLUMNS = (
    "kl",
    "kl_reverse",
    "top1",
    "top5",
    "logit_error",
    "max_logit_error",
    "cosine",
    "loss",
    "token",
    "probability",
)
"""What `compare` gives for each token; the last two are the most likely token and its probability."""


class Reference(NamedTuple):
    """The reference's logits of some tokens, wide, and what follows from them, in float64."""

    logits_TV: Tensor
    log_p_TV: Tensor
    top5_TK: Tensor
    targets_T: Tensor

    @classmethod
    def of(cls, logits_TV: Tensor, targets_T: Tensor) -> Reference:
        """Prepares a comparison; `targets_T` are the tokens that follow, -1 where none does."""
        log_p_TV = logits_TV.double().log_softmax(-1)
        return cls(logits_TV, log_p_TV, _top5(logits_TV), targets_T)

    @property
    def loss(self) -> Tensor:
        """The reference's own loss, `[T]`; 0 where no token follows."""
        return _loss(self.log_p_TV, self.targets_T)

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The most likely token and its probability, each `[T]`."""
        best_T = self.top5_TK[:, 0]
        return best_T, self.log_p_TV.gather(1, best_T.unsqueeze(1)).squeeze(1).exp()


def chunk_size(vocab_size: int) -> int:
    """Returns how many tokens to compare at once."""
    return max(16, min(1024, _ELEMENTS_AT_ONCE // vocab_size))


def following(tokens_BL: Tensor, by: int) -> Tensor:
    """Returns the token `by` places later `[B, L]`, -1 where the sequence has ended."""
    import torch

    targets_BL = torch.full_like(tokens_BL, -1)
    targets_BL[:, :-by] = tokens_BL[:, by:]
    return targets_BL


def compare(reference: Reference, logits_TV: Tensor) -> Tensor:
    """Returns how a run's logits compare with the reference's: float64 `[T, len(COLUMNS)]`."""
    import torch

    log_p_TV, log_q_TV = reference.log_p_TV, logits_TV.double().log_softmax(-1)
    apart_TV = log_p_TV - log_q_TV
    top5_TK = _top5(logits_TV)
    shared_T = (top5_TK.unsqueeze(2) == reference.top5_TK.unsqueeze(1)).any(2).double().mean(1)
    errors_TV = (logits_TV - reference.logits_TV).abs()
    best_T = top5_TK[:, 0]
    columns = (
        (log_p_TV.exp() * apart_TV).sum(1).clamp_min(0),  # below 0 only by rounding
        (log_q_TV.exp() * -apart_TV).sum(1).clamp_min(0),
        (best_T == reference.top5_TK[:, 0]).double(),
        shared_T,
        errors_TV.mean(1, dtype=torch.float64),
        errors_TV.amax(1).double(),
        _cosine(reference.logits_TV, logits_TV),
        _loss(log_q_TV, reference.targets_T),
        best_T.double(),
        log_q_TV.gather(1, best_T.unsqueeze(1)).squeeze(1).exp(),
    )
    return torch.stack(columns, dim=1)


def divergence(table: Tensor, num_targets: int) -> Divergence:
    """Returns the figures of all tokens; `table` is that of `compare`, on the CPU."""
    column = _columns(table)
    kl_T = column["kl"]
    return Divergence(
        kl=float(kl_T.mean()),
        kl_reverse=float(column["kl_reverse"].mean()),
        kl_p99=float(kl_T.quantile(0.99)),
        kl_max=float(kl_T.max()),
        top1=float(column["top1"].mean()),
        top5=float(column["top5"].mean()),
        logit_error=float(column["logit_error"].mean()),
        max_logit_error=float(column["max_logit_error"].max()),
        cosine=float(column["cosine"].mean()),
        perplexity=perplexity(column["loss"], num_targets),
    )


def perplexity(loss_T: Tensor, num_targets: int) -> float:
    """Returns exp of the mean loss of the tokens that are followed by one."""
    return float((loss_T.sum() / max(1, num_targets)).exp())


def histogram(divergences: Mapping[str, Tensor]) -> Histogram:
    """Returns how many tokens of each run have which divergence; NaN counts as the largest."""
    import torch

    inner = torch.tensor(_EDGES[1:-1], dtype=torch.float64)
    counts = {}
    for run, kl_T in divergences.items():
        bins_T = torch.bucketize(kl_T[kl_T != 0].nan_to_num(float("inf")), inner, right=True)
        counts[run] = tuple(torch.bincount(bins_T, minlength=len(_EDGES) - 1).tolist())
    num_zero = {run: int((kl_T == 0).sum()) for run, kl_T in divergences.items()}
    return Histogram(_EDGES, counts, num_zero)


def _columns(table: Tensor) -> dict[str, Tensor]:
    return dict(zip(COLUMNS, table.unbind(1), strict=True))


def _top5(logits_TV: Tensor) -> Tensor:
    """Returns the five most likely tokens; equal logits give equal ones, in whatever order ties come."""
    count = min(5, logits_TV.shape[1])
    return logits_TV.topk(count, dim=1).indices


def _loss(log_p_TV: Tensor, targets_T: Tensor) -> Tensor:
    loss_T = -log_p_TV.gather(1, targets_T.clamp_min(0).unsqueeze(1)).squeeze(1)
    return loss_T.masked_fill(targets_T < 0, 0.0)


def _cosine(one_TV: Tensor, other_TV: Tensor) -> Tensor:
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(one_TV.double(), other_TV.double(), dim=1).clamp_max(1)
