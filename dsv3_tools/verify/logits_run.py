"""One rank's work of a comparison of logits, and what comes home of it.

Shape suffixes: B sequences, L tokens of a sequence, T = B x L, D hidden, M columns of `metrics`.
"""
# ruff: noqa: N803, N806, N815 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import Source
from dsv3_tools.model.head import Head
from dsv3_tools.model.launch import Report
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.model.transformer import Transformer
from dsv3_tools.verify.hidden_errors import ratio, squares
from dsv3_tools.verify.lockstep import Lockstep, States, Step
from dsv3_tools.verify.logits_results import LayerResult
from dsv3_tools.verify.metrics import COLUMNS, Reference, chunk_size, compare, following

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Findings", "HeadFindings", "Request", "compare_models"]

_ON_HOST_FROM = 16 << 30
"""Bytes of hidden states of all runs above which they wait in host memory."""


@dataclass(frozen=True)
class Request:
    """What to compare: the same in every rank."""

    reference: Source
    candidate: Source
    tokens_BL: Tensor
    dtype: str
    baseline: bool


@dataclass
class HeadFindings:
    """What the logits of one head have shown.

    Attributes:
        tables: per run, `metrics.compare` of all tokens: float64 `[T, M]`.
        loss_T: the reference's own loss of each.
        best_T: its most likely token.
        probability_T: the probability of that.
        targets_T: the tokens that follow, -1 where none does.
        error: of the candidate's head on the reference's hidden states.
    """

    tables: dict[str, Tensor]
    loss_T: Tensor
    best_T: Tensor
    probability_T: Tensor
    targets_T: Tensor
    error: float


@dataclass
class Findings:
    """What a rank has found; all ranks find the same.

    Attributes:
        main: of the main model's logits.
        mtp: of every MTP layer's.
        layers: of all layers.
        embedding: relative error of the hidden states before the first layer.
        errors: per layer of the main model, each token's squared error and signal, replayed.
        mtp_layers: how many the reference has, and the candidate.
        routes_per_expert: tokens that a routed expert gets in a layer, on average.
    """

    main: HeadFindings
    layers: list[LayerResult]
    embedding: float
    errors: list[tuple[Tensor, Tensor]]
    mtp_layers: tuple[int, int]
    routes_per_expert: float
    mtp: list[HeadFindings] = field(default_factory=list)


def compare_models(ranks: RankGroup, device: str, report: Report, request: Request) -> Findings:
    """Runs both models in lockstep; reports the number of every layer that is done.

    Raises:
        CheckpointError: a model is not one that the forward pass knows, or cannot be read.
    """
    with Checkpoint(request.reference) as reference, Checkpoint(request.candidate) as candidate:
        models = [
            Transformer(one, device=device, dtype=request.dtype, through_bf16=True, ranks=ranks)
            for one in (reference, candidate)
        ]
        for model in models:
            model.check()
        return _Comparison(models[0], models[1], request, report).run()


def _say_nothing(_: object) -> None:
    """Stands for the reports of all ranks but the first."""


class _Comparison:
    """Two models and the way through them."""

    def __init__(
        self, reference: Transformer, candidate: Transformer, request: Request, report: Report
    ) -> None:
        self._models = reference, candidate
        self._lockstep = Lockstep(reference, candidate, baseline=request.baseline)
        self._tokens_BL = request.tokens_BL
        self._report = report if reference.ranks.rank == 0 else _say_nothing

    def run(self) -> Findings:
        """Returns what was found in all layers and logits."""
        tokens_BL = self._tokens_BL
        states = self._lockstep.embed(tokens_BL, on_host=self._is_large())
        embedding = ratio(*squares(states.theirs[0], states.reference))
        layers, errors = [], []
        for step in self._lockstep.layers(states):
            layers.append(step.result)
            errors.append((step.error_T, step.signal_T))
            states = step.states
            self._report(step.result.number)
        heads = [model.head() for model in self._models]
        main = self._compare_logits(states, heads, following(tokens_BL, 1))
        del heads
        num_ours, num_theirs = (len(model.mtp_layers) for model in self._models)
        dims = self._models[0].settings.dims
        routes = tokens_BL.numel() * dims.num_experts_per_tok / dims.n_routed_experts
        findings = Findings(main, layers, embedding, errors, (num_ours, num_theirs), routes)
        for index in range(min(num_ours, num_theirs)):
            if tokens_BL.shape[1] < index + 2:
                break
            step = self._advance_mtp(index, states)
            states = step.states
            heads = [model.mtp(index).head() for model in self._models]
            targets = following(tokens_BL, index + 2)[:, : -1 - index]
            findings.mtp.append(self._compare_logits(states, heads, targets))
            findings.layers.append(replace(step.result, head=findings.mtp[-1].error))
            del heads
            self._report(step.result.number)
        return findings

    def _advance_mtp(self, index: int, states: States) -> Step:
        """Returns the result of an MTP layer, for all positions whose next token is known."""
        shorter = States([h[:, :-1] for h in states.ours], [h[:, :-1] for h in states.theirs])
        return self._lockstep.mtp(index, shorter, self._tokens_BL[:, index + 1 :])

    def _compare_logits(self, states: States, heads: Sequence[Head], targets_BL: Tensor) -> HeadFindings:
        """Compares the logits of every run; the ranks share the tokens."""
        import torch

        ours, theirs = heads
        runs = states.by_run()
        ranks, device = self._models[0].ranks, self._models[0].device
        targets_T = targets_BL.flatten()
        hidden = {run: values.flatten(0, -2) for run, values in runs.items()}
        reference_TD = states.reference.flatten(0, -2)
        tables = {
            run: torch.zeros((len(targets_T), len(COLUMNS)), dtype=torch.float64, device=device)
            for run in runs
        }
        own_T3 = torch.zeros((len(targets_T), 3), dtype=torch.float64, device=device)
        apart_T2 = torch.zeros((len(targets_T), 2), dtype=torch.float64, device=device)
        size = chunk_size(self._models[0].settings.dims.vocab_size)
        for start in range(ranks.rank * size, len(targets_T), ranks.world_size * size):
            rows = slice(start, start + size)
            logits_TV = ours.logits(reference_TD[rows])
            reference = Reference.of(logits_TV, targets_T[rows].to(device))
            own_T3[rows] = torch.stack([reference.loss, *reference.best], dim=1)
            local_TV = theirs.logits(reference_TD[rows])
            apart_T2[rows] = torch.stack(squares(local_TV, logits_TV), dim=1).to(device)
            for run, table in tables.items():
                head = ours if run.startswith("noise") else theirs
                table[rows] = compare(reference, head.logits(hidden[run][rows]))
        own_T3, apart_T2 = ranks.sum_(own_T3).cpu(), ranks.sum_(apart_T2).cpu()
        return HeadFindings(
            {run: ranks.sum_(table).cpu() for run, table in tables.items()},
            loss_T=own_T3[:, 0],
            best_T=own_T3[:, 1].long(),
            probability_T=own_T3[:, 2],
            targets_T=targets_T,
            error=ratio(*apart_T2.unbind(1)),
        )

    def _is_large(self) -> bool:
        """Whether hidden states of all runs, before and after a layer, are too much for a GPU."""
        settings = self._models[0].settings
        nbytes = 2 * 6 * 4 * self._tokens_BL.numel() * settings.dims.hidden_size
        return self._models[0].device.type == "cuda" and nbytes > _ON_HOST_FROM
