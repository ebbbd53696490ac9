"""What a comparison of two models' logits found: figures for all tokens, for every layer, for the worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv3_tools.checkpoint.source import Source

__all__ = [
    "RUNS",
    "Divergence",
    "ExpertError",
    "HeatMap",
    "Histogram",
    "LayerResult",
    "LogitsReport",
    "Thresholds",
    "WorstToken",
]

RUNS = {
    "replayed": "the candidate, every token sent to the experts that the reference chose",
    "free": "the candidate, choosing experts by itself",
    "noise_replayed": "the reference in the other type of arithmetic, its own choice of experts replayed",
    "noise_free": "the reference in the other type of arithmetic, choosing experts again",
}
"""The runs that are compared with the reference, and what each is."""


@dataclass(frozen=True)
class Divergence:
    """How far a run's logits are from the reference's, over all positions.

    Attributes:
        kl: mean KL divergence of the run from the reference, KL(reference || run), in nats.
        kl_reverse: mean KL(run || reference), in nats.
        kl_p99: 99th percentile of the first over positions.
        kl_max: its largest value.
        top1: share of positions whose most likely token is the same.
        top5: share of the five most likely tokens that are the same, in any order.
        logit_error: mean of |difference of logits|.
        max_logit_error: the largest.
        cosine: mean cosine of the two vectors of logits.
        perplexity: the run's own, of the tokens that follow.
    """

    kl: float
    kl_reverse: float
    kl_p99: float
    kl_max: float
    top1: float
    top5: float
    logit_error: float
    max_logit_error: float
    cosine: float
    perplexity: float


@dataclass(frozen=True)
class ExpertError:
    """The error of one routed expert.

    Attributes:
        number: of the expert.
        error: of its outputs, relative to them, over the tokens that it gets (estimated from random
            projections of the outputs); both sides have the same inputs.
        num_tokens: how many it gets.
    """

    number: int
    error: float
    num_tokens: int


@dataclass(frozen=True)
class LayerResult:
    """One layer's figures.

    The last seven are measured on the reference's own hidden states, given to the candidate's layer: they
    show this layer's own error, not what was handed down to it.

    Attributes:
        number: counted from 0 through the MTP layers.
        kind: "dense", "moe" or "mtp".
        hidden: per run, the error of the hidden states after the layer relative to them (both root mean
            squares over all tokens).
        routes: per run that chooses for itself, the share of chosen experts that the reference chose, too;
            empty for a dense layer.
        attention: error of what the attention block adds, relative to it.
        mlp: error of what the MLP or the experts add, relative to it, with the reference's routes.
        join: error of an MTP layer's input, made of embedding and hidden state; None for others.
        router: largest difference of the scores by which experts are chosen; None for a dense layer.
        rerouted: share of tokens that the candidate's router sends to other experts; None for a dense layer.
        experts: the routed experts with the largest errors, largest first.
        head: error of the logits that an MTP layer's own norm and output matrix give for the reference's
            hidden states, relative to them; None for others.
    """

    number: int
    kind: str
    hidden: Mapping[str, float] = field(default_factory=dict)
    routes: Mapping[str, float] = field(default_factory=dict)
    attention: float = 0.0
    mlp: float = 0.0
    join: float | None = None
    router: float | None = None
    rerouted: float | None = None
    experts: tuple[ExpertError, ...] = ()
    head: float | None = None


@dataclass(frozen=True)
class WorstToken:
    """A position whose prediction differs most, routes replayed.

    Attributes:
        sequence: number of its sequence, from 0.
        position: in the sequence, from 0; what follows it is predicted.
        kl: KL(reference || candidate) in nats.
        context: the text up to it, or token ids if there is no tokenizer.
        reference: the reference's most likely next token, as text or id.
        reference_probability: its probability by the reference.
        candidate: the candidate's most likely next token.
        candidate_probability: its probability by the candidate.
    """

    sequence: int
    position: int
    kl: float
    context: str
    reference: str
    reference_probability: float
    candidate: str
    candidate_probability: float


@dataclass(frozen=True)
class Histogram:
    """How many positions have a KL(reference || run) between two neighbouring edges.

    Attributes:
        edges: in nats, growing by equal factors; what lies beyond them is counted in the outermost bins.
        counts: per run, one count for each pair of neighbouring edges.
        num_zero: per run, positions with a divergence of exactly 0, which are in no bin.
    """

    edges: tuple[float, ...]
    counts: Mapping[str, tuple[int, ...]]
    num_zero: Mapping[str, int]


@dataclass(frozen=True)
class HeatMap:
    """Relative error of hidden states after each layer, replayed, over stretches of neighbouring tokens.

    MTP layers, which have fewer tokens, are not in it.

    Attributes:
        layers: the rows' layer numbers.
        starts: the columns' first tokens, counted through all sequences.
        values: a row for each layer.
    """

    layers: tuple[int, ...]
    starts: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Thresholds:
    """What a comparison must reach; None is not asked for.

    Attributes:
        preset: name of the preset that these come from.
        max_kl: of the mean KL(reference || candidate), routes replayed, in nats.
        min_top1: of the share of positions with the same most likely token, routes replayed.
        min_top5: of the share of the five most likely, routes replayed.
        max_logit_error: of the largest |difference of logits|, routes replayed.
        max_free_kl: of the mean KL, each side choosing its experts.
        max_perplexity_rise: of candidate's perplexity / reference's - 1, routes replayed.
        max_block_error: of every block's own error: attention, MLP or experts, input of an MTP layer.
        max_expert_error: of every routed expert's own error.
        max_router_error: of the largest difference of a router's scores on equal inputs.
    """

    preset: str
    max_kl: float | None = None
    min_top1: float | None = None
    min_top5: float | None = None
    max_logit_error: float | None = None
    max_free_kl: float | None = None
    max_perplexity_rise: float | None = None
    max_block_error: float | None = None
    max_expert_error: float | None = None
    max_router_error: float | None = None


@dataclass(frozen=True)
class LogitsReport:
    """How the candidate's predictions compare with the reference's.

    Attributes:
        reference: the reference's directory.
        candidate: the candidate's.
        tokens: where the tokens are from, and how many: "built-in text, 10 x 512".
        num_sequences: sequences of tokens.
        length: tokens of each.
        devices: what computed, one for each rank.
        dtype: type of arithmetic: "F32" or "BF16"; weights are rounded to BF16 in both.
        formats: formats of the reference's and of the candidate's weights, the most frequent first.
        perplexity: the reference's.
        runs: per name of `RUNS`, the divergence from the reference; without the noise runs if not asked for.
        mtp: the same for every MTP layer that both have, in order.
        layers: all layers that both have, MTP layers last.
        worst: positions with the largest divergence, largest first.
        histogram: of the divergences.
        heat: errors of hidden states by layer and place.
        thresholds: what was to be reached.
        problems: what was missed, each with the place that it comes from as far as that is known.
        notes: what differs and may.
        seconds: the whole comparison took.
        nbytes: bytes of weights that were read.
        embedding: error of the hidden states before the first layer, relative to them.
        head: error of the logits that the candidate's final norm and output matrix give for the reference's
            hidden states, relative to them.
    """

    reference: Source
    candidate: Source
    tokens: str
    num_sequences: int
    length: int
    devices: tuple[str, ...]
    dtype: str
    formats: tuple[tuple[str, ...], tuple[str, ...]]
    perplexity: float
    runs: Mapping[str, Divergence]
    mtp: tuple[Mapping[str, Divergence], ...]
    layers: tuple[LayerResult, ...]
    worst: tuple[WorstToken, ...]
    histogram: Histogram
    heat: HeatMap
    thresholds: Thresholds
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    nbytes: int
    embedding: float = 0.0
    head: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing was missed."""
        return not self.problems
