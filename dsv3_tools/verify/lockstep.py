"""Two models side by side over the same tokens, layer by layer, every weight of each being read once.

The reference runs as it is; the candidate once sent to the experts that the reference chose ("replayed") and
once choosing by itself ("free"). The reference's own weights in the other type of arithmetic, replayed and
free, show what mere rounding does. Besides, every layer of the candidate is given the reference's hidden
states: what it then gives differs by this layer's own error, with nothing handed down from the layers before.

Shape suffixes: B sequences, L tokens of a sequence, T = B x L, D hidden, E routed experts, K experts of a
token.
"""
# ruff: noqa: N803, N806, N815 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from dsv3_tools.model.layer import Layer, add_residuals
from dsv3_tools.model.moe import Routes, Sketch
from dsv3_tools.model.transformer import Transformer
from dsv3_tools.verify.hidden_errors import expert_errors, ratio, relative_error, shared_routes, squares
from dsv3_tools.verify.logits_results import RUNS, LayerResult

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Lockstep", "States", "Step"]


@dataclass(frozen=True)
class States:
    """Hidden states of every run at one place, by whose weights they are.

    `ours` are the reference, noise_replayed and noise_free (or the reference alone); `theirs` are replayed
    and free.
    """

    ours: list[Tensor]
    theirs: list[Tensor]

    @property
    def reference(self) -> Tensor:
        """The reference's own."""
        return self.ours[0]

    def by_run(self) -> dict[str, Tensor]:
        """Returns those of every run but the reference."""
        return dict(zip(RUNS, [*self.theirs, *self.ours[1:]], strict=False))


class Step(NamedTuple):
    """What one layer made of the states, and how far apart they are.

    `error_T` and `signal_T` are each token's squares of the replayed run's error and of the reference's
    hidden states, float64 on the CPU.
    """

    states: States
    result: LayerResult
    error_T: Tensor
    signal_T: Tensor


class Lockstep:
    """The two models.

    Args:
        reference: a model.
        candidate: one of the same dimensions, on the same device, with the same ranks and arithmetic.
        baseline: whether to run the reference in the other type of arithmetic as well.
    """

    def __init__(self, reference: Transformer, candidate: Transformer, *, baseline: bool) -> None:
        self.reference = reference
        self.candidate = candidate
        self._baseline = baseline

    def embed(self, tokens_BL: Tensor, *, on_host: bool) -> States:
        """Returns the states before the first layer."""
        ours = self.reference.embed(tokens_BL, on_host=on_host)
        theirs = self.candidate.embed(tokens_BL, on_host=on_host)
        return States([ours, *self._noise(ours)], [theirs, theirs])

    def layers(self, states: States) -> Iterator[Step]:
        """Yields the result of every layer of the main model."""
        pairs = zip(self.reference.layers(), self.candidate.layers(), strict=True)
        for (_, ours), (_, theirs) in pairs:
            step = self._advance(ours, theirs, states, "moe" if ours.is_moe else "dense")
            states = step.states
            yield step

    def mtp(self, index: int, states: States, next_BL: Tensor) -> Step:
        """Returns the result of an MTP layer, from hidden states after the layer before it.

        Args:
            index: of the MTP layer, from 0.
            states: not normalised, with as many positions as `next_BL`.
            next_BL: the token after each position (after the last one that the layer before predicts from).
        """
        opened = self.reference.mtp(index).opened(), self.candidate.mtp(index).opened()
        with opened[0] as (our_join, ours), opened[1] as (their_join, theirs):
            joined = our_join(states.ours, next_BL)
            *others, local = their_join([*states.theirs, states.reference], next_BL)
            error = relative_error(local, joined[0])
            step = self._advance(ours, theirs, States(joined, others), "mtp")
        return step._replace(result=replace(step.result, join=error))

    def _noise(self, hidden_BLD: Tensor) -> list[Tensor]:
        import torch

        if not self._baseline:
            return []
        other = torch.bfloat16 if hidden_BLD.dtype == torch.float32 else torch.float32
        return [hidden_BLD.to(other)] * 2

    def _advance(self, ours: Layer, theirs: Layer, states: States, kind: str) -> Step:
        """Returns what the two layers make of the states."""
        our_added = ours.attention_all(states.ours)
        *their_added, local = theirs.attention_all([*states.theirs, states.reference])
        result = LayerResult(ours.number, kind, attention=relative_error(local, our_added[0]))
        middle = States(add_residuals(states.ours, our_added), add_residuals(states.theirs, their_added))
        del our_added, their_added, local
        routes = ours.route(middle.reference) if ours.is_moe else None
        our_sketch, their_sketch = self._sketches(middle.reference, routes)
        our_added, our_routes = ours.mlp_all(
            middle.ours, [routes, routes, None][: len(middle.ours)], sketches={0: our_sketch}
        )
        (*their_added, local), their_routes = theirs.mlp_all(
            [*middle.theirs, middle.reference], [routes, None, routes], sketches={2: their_sketch}
        )
        result = replace(result, mlp=relative_error(local, our_added[0]))
        if routes is not None:
            num_experts = self.reference.settings.dims.n_routed_experts
            free = {"free": their_routes[1], "noise_free": our_routes[-1] if self._baseline else None}
            result = replace(
                self._compare_routers(ours, theirs, middle.reference, result, routes),
                routes={run: shared_routes(found, routes)[0] for run, found in free.items() if found},
                experts=expert_errors(our_sketch, their_sketch, routes, num_experts, self.reference.ranks),
            )
        after = States(add_residuals(middle.ours, our_added), add_residuals(middle.theirs, their_added))
        sums = {run: squares(hidden, after.reference) for run, hidden in after.by_run().items()}
        result = replace(result, hidden={run: ratio(*pair) for run, pair in sums.items()})
        return Step(after, result, *sums["replayed"])

    def _sketches(self, middle_BLD: Tensor, routes: Routes | None) -> tuple[Sketch, Sketch]:
        """Returns an empty sketch for either side."""
        num_rows = 0 if routes is None else routes.indices.numel()
        size, device = middle_BLD.shape[-1], self.reference.device
        return Sketch(size, num_rows, device), Sketch(size, num_rows, device)

    @staticmethod
    def _compare_routers(
        ours: Layer, theirs: Layer, middle_BLD: Tensor, result: LayerResult, routes: Routes
    ) -> LayerResult:
        """Returns the result with how the routers differ on the same hidden states."""
        our_choice_TE, their_choice_TE = ours.scores(middle_BLD).choice, theirs.scores(middle_BLD).choice
        _, kept = shared_routes(theirs.route(middle_BLD), routes)
        apart = float((their_choice_TE - our_choice_TE).abs().max())
        return replace(result, router=apart, rerouted=1 - kept)
