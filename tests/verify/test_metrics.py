"""Figures of logits against sums written out in numpy's float64, and against transformers' own model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dsv3_tools
from dsv3_tools.model.tokens import Tokens
from dsv3_tools.verify import logits_run, metrics
from dsv3_tools.verify.lockstep import States
from dsv3_tools.verify.logits_limits import PRESETS, missed
from dsv3_tools.verify.logits_results import Divergence
from dsv3_tools.verify.logits_run import HeadFindings
from dsv3_tools.verify.logits_summary import heat_map, worst_tokens
from dsv3_tools.verify.metrics import COLUMNS, Reference

NUM_TOKENS, VOCAB_SIZE = 101, 37
FIELDS = [field.name for field in dataclasses.fields(Divergence)]


def log_softmax(row) -> np.ndarray:
    row = np.asarray(row, np.float64)
    return row - row.max() - math.log(sum(math.exp(value - row.max()) for value in row))


def best(row, count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda token: -row[token])[:count]


def expected_row(p, q, target: int) -> dict[str, float]:
    """What two vectors of logits are apart, from the definitions."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    log_p, log_q = log_softmax(p), log_softmax(q)
    count = min(5, len(p))
    return {
        "kl": sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)),
        "kl_reverse": sum(math.exp(b) * (b - a) for a, b in zip(log_p, log_q, strict=True)),
        "top1": float(best(p, 1) == best(q, 1)),
        "top5": len(set(best(p, count)) & set(best(q, count))) / count,
        "logit_error": sum(abs(p - q)) / len(p),
        "max_logit_error": max(abs(p - q)),
        "cosine": (p @ q) / math.sqrt((p @ p) * (q @ q)),
        "loss": 0.0 if target < 0 else -log_q[target],
        "token": best(q, 1)[0],
        "probability": math.exp(max(log_q)),
    }


def expected_figures(p, q, targets) -> dict[str, float]:
    rows = [expected_row(*each) for each in zip(p, q, targets, strict=True)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in COLUMNS}
    kl = sorted(row["kl"] for row in rows)
    place = 0.99 * (len(kl) - 1)
    low, high = math.floor(place), math.ceil(place)
    return {name: mean[name] for name in FIELDS if name in mean} | {
        "kl_p99": kl[low] + (place - low) * (kl[high] - kl[low]),
        "kl_max": kl[-1],
        "max_logit_error": max(row["max_logit_error"] for row in rows),
        "perplexity": math.exp(sum(row["loss"] for row in rows) / sum(target >= 0 for target in targets)),
    }


def table_of(p, q, targets) -> torch.Tensor:
    return metrics.compare(Reference.of(p, targets), q)


def figures(p, q, targets) -> dict[str, float]:
    found = metrics.divergence(table_of(p, q, targets), int((targets >= 0).sum()))
    return dataclasses.asdict(found)


def lopsided(num_tokens: int = NUM_TOKENS, vocab_size: int = VOCAB_SIZE) -> tuple[torch.Tensor, ...]:
    """Logits of which the second are much flatter, so that the two KLs are far apart, and targets."""
    random = torch.Generator().manual_seed(7)
    p = 3 * torch.randn(num_tokens, vocab_size, generator=random) + 1
    q = 0.4 * p + 0.5 * torch.randn(num_tokens, vocab_size, generator=random)
    targets = torch.randint(vocab_size, (num_tokens,), generator=random)
    targets[::7] = -1
    return p, q, targets


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 5, 3])
@pytest.mark.parametrize("swapped", [False, True])
def test_every_column_of_every_token(vocab_size: int, swapped: bool) -> None:
    p, q, targets = lopsided(vocab_size=vocab_size)
    p, q = (q, p) if swapped else (p, q)
    table = table_of(p, q, targets)
    assert table.dtype == torch.float64
    assert table.shape == (NUM_TOKENS, len(COLUMNS))
    for found, *given in zip(table.tolist(), p.numpy(), q.numpy(), targets.tolist(), strict=True):
        expected = expected_row(*given)
        assert dict(zip(COLUMNS, found, strict=True)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 2, 50, NUM_TOKENS])
def test_figures_of_all_tokens(num_tokens: int) -> None:
    p, q, targets = lopsided(num_tokens)
    targets[0] = 3
    expected = expected_figures(p.numpy(), q.numpy(), targets.tolist())
    assert figures(p, q, targets) == pytest.approx(expected, rel=1e-6)


def test_the_data_tell_mistakes_apart() -> None:
    """Figures that could be mistaken for each other differ by far more than the tolerance."""
    p, q, targets = lopsided()
    found = figures(p, q, targets)
    kl = table_of(p, q, targets)[:, 0]
    assert found["kl"] < 0.95 * found["kl_reverse"] or found["kl"] > 1.05 * found["kl_reverse"]
    assert float(kl.median()) < 0.9 * found["kl_p99"] < 0.99 * found["kl_max"]
    shares = set(table_of(p, q, targets)[:, COLUMNS.index("top5")].tolist())
    assert len(shares) >= 3
    assert 0.1 < found["top1"] < 0.9


def test_swapping_the_models_swaps_both_directions() -> None:
    p, q, targets = lopsided()
    one, other = figures(p, q, targets), figures(q, p, targets)
    assert one["kl"] == pytest.approx(other["kl_reverse"], rel=1e-12)
    assert one["kl_reverse"] == pytest.approx(other["kl"], rel=1e-12)
    assert one["kl"] != pytest.approx(other["kl"], rel=1e-2)


def test_kl_of_two_tokens_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3, and 1/4 log 1/2 + 3/4 log 3/2."""
    p, q = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    found = table_of(p.double(), q, torch.tensor([0]))[0]
    assert float(found[0]) == pytest.approx(math.log(4 / 3) / 2)
    assert float(found[1]) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert float(found[COLUMNS.index("loss")]) == pytest.approx(math.log(4))


def test_top5_are_sets() -> None:
    p = torch.arange(12.0).flip(0).repeat(4, 1)
    q = p.clone()
    q[0, :5] = p[0, :5].flip(0)  # the same five in another order
    q[1, 4], q[1, 5] = p[1, 5], p[1, 4]  # four of them
    q[2, [0, 1, 7, 8]] = p[2, [7, 8, 0, 1]]  # three of them
    q[3] = -p[3]  # none
    table = table_of(p, q, torch.zeros(4, dtype=torch.long))
    assert table[:, COLUMNS.index("top5")].tolist() == pytest.approx([1, 0.8, 0.6, 0])
    assert table[:, COLUMNS.index("top1")].tolist() == [0, 1, 0, 0]


def test_ties() -> None:
    """Equal logits are equal, wherever ties lie; a tie is won by one of those that share it."""
    p = torch.zeros(4, VOCAB_SIZE)
    p[1, 8:] = 1  # across the fifth place
    p[2, [3, 30]] = 2
    found = figures(p, p.clone(), torch.full((4,), 3))
    assert (found["kl"], found["kl_reverse"], found["top1"], found["top5"]) == (0, 0, 1, 1)
    tokens, probabilities = Reference.of(p, torch.full((4,), 3)).best
    assert int(tokens[2]) in {3, 30}
    assert float(probabilities[0]) == pytest.approx(1 / VOCAB_SIZE)
    q = p.clone()
    q[2, 30] = 3
    assert int(table_of(p, q, torch.full((4,), 3))[2, COLUMNS.index("token")]) == 30


def test_equal_logits_are_exactly_equal() -> None:
    p, _, targets = lopsided()
    found = figures(p, p.clone(), targets)
    exact = {"kl", "kl_reverse", "kl_p99", "kl_max", "logit_error", "max_logit_error"}
    assert all(found[name] == 0 for name in exact)
    assert found["cosine"] == pytest.approx(1, rel=1e-14)
    assert found["cosine"] <= 1


def test_the_reference_itself() -> None:
    p, _, targets = lopsided()
    reference = Reference.of(p, targets)
    rows = [expected_row(row, row, target) for row, target in zip(p.numpy(), targets.tolist(), strict=True)]
    assert reference.loss.tolist() == pytest.approx([row["loss"] for row in rows], rel=1e-12)
    tokens, probabilities = reference.best
    assert tokens.tolist() == [row["token"] for row in rows]
    assert probabilities.tolist() == pytest.approx([row["probability"] for row in rows], rel=1e-12)
    assert reference.log_p_TV.dtype == torch.float64


def test_perplexity() -> None:
    losses = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    assert metrics.perplexity(losses, 2) == pytest.approx(math.exp(1.5))
    assert metrics.perplexity(torch.zeros(3, dtype=torch.float64), 0) == 1
    uniform = torch.zeros(6, VOCAB_SIZE)
    assert figures(uniform, uniform, torch.tensor([4, -1, 0, -1, 36, -1]))["perplexity"] == pytest.approx(
        VOCAB_SIZE
    )


SPOILED = {
    "NaN": (float("nan"), slice(3, 4)),
    "inf": (float("inf"), slice(3, 4)),
    "-inf": (float("-inf"), slice(3, 4)),
    "all NaN": (float("nan"), slice(None)),
    "all inf": (float("inf"), slice(None)),
}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
def test_what_is_not_a_number_never_passes(name: str, side: str) -> None:
    value, place = SPOILED[name]
    p, _, targets = lopsided()
    q = p.clone()
    for logits in {"reference": [p], "candidate": [q], "both": [p, q]}[side]:
        logits[5, place] = value
    table = table_of(p, q, targets)
    found = metrics.divergence(table, int((targets >= 0).sum()))
    for figure in ("kl", "kl_max", "logit_error", "max_logit_error"):
        assert not getattr(found, figure) <= 1e30, figure
    for figure in ("kl", "kl_reverse"):
        assert float(table[5, COLUMNS.index(figure)]) != 0
        assert bool((table[torch.arange(NUM_TOKENS) != 5, COLUMNS.index(figure)] == 0).all())
    problems = list(missed(PRESETS["int4"], {"replayed": found, "free": found}, 9.0))
    assert problems[0].startswith("KL(reference || candidate), routes replayed is ")
    counted = metrics.histogram({"run": table[:, 0]})
    assert (counted.counts["run"][-1], counted.num_zero["run"]) == (1, NUM_TOKENS - 1)


def test_histogram() -> None:
    random = torch.Generator().manual_seed(2)
    spread = 10 ** (16 * torch.rand(500, generator=random, dtype=torch.float64) - 13)
    edges = metrics.histogram({}).edges
    assert (edges[0], edges[-1]) == (pytest.approx(1e-10), pytest.approx(10))
    ratios = [high / low for low, high in itertools.pairwise(edges)]
    assert ratios == pytest.approx([10 ** (1 / 3)] * (len(edges) - 1))
    special = [0.0, 0.0, 1e-300, 1e-10, 10.0, 1e5, math.inf, math.nan, *edges]
    values = torch.cat([spread, torch.tensor(special, dtype=torch.float64)])
    found = metrics.histogram({"free": values, "replayed": torch.zeros(3, dtype=torch.float64)})
    expected = [0] * (len(edges) - 1)
    for value in values.tolist():
        if value == 0:
            continue
        inside = [place for place in range(len(expected)) if edges[place] <= value < edges[place + 1]]
        expected[inside[0] if inside else 0 if value < edges[0] else -1] += 1
    assert found.counts == {"free": tuple(expected), "replayed": (0,) * len(expected)}
    assert found.num_zero == {"free": 2, "replayed": 3}
    assert sum(expected) + 2 == len(values)


@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("length", [2, 3, 9])
def test_following(by: int, length: int) -> None:
    tokens = torch.arange(10, 10 + 3 * length).view(3, length)
    expected = [[*row[by:], *[-1] * min(by, length)] for row in tokens.tolist()]
    assert metrics.following(tokens, by).tolist() == expected


def test_chunk_size() -> None:
    for vocab_size in (3, 2048, 32768, 102400, 129280, 2**21, 2**25):
        size = metrics.chunk_size(vocab_size)
        assert 16 <= size <= 1024
        assert size == 16 or size * vocab_size * 8 <= 256 << 20
        assert size == 1024 or (size + 1) * vocab_size * 8 > 256 << 20


@pytest.mark.parametrize("num_tokens", [1, 5, 127, 128, 129, 300, 1000])
def test_heat_map(num_tokens: int) -> None:
    random = np.random.default_rng(num_tokens)
    layers = [(random.random(num_tokens), 1 + random.random(num_tokens)) for _ in range(2)]
    layers.append((np.zeros(num_tokens), np.ones(num_tokens)))
    found = heat_map([(torch.from_numpy(error), torch.from_numpy(signal)) for error, signal in layers])
    assert found.layers == (0, 1, 2)
    assert found.starts[0] == 0
    assert len(found.starts) == min(num_tokens, 128)
    ends = [*found.starts[1:], num_tokens]
    widths = [end - start for start, end in zip(found.starts, ends, strict=True)]
    assert min(widths) >= 1
    assert max(widths) - min(widths) <= 1
    for row, (error, signal) in zip(found.values, layers, strict=True):
        expected = [
            math.sqrt(sum(error[start:end]) / sum(signal[start:end]))
            for start, end in zip(found.starts, ends, strict=True)
        ]
        assert row == pytest.approx(expected, rel=1e-12)


def test_heat_map_of_no_number() -> None:
    error = torch.tensor([0.0, math.nan, math.inf, 1.0])
    row = heat_map([(error, torch.tensor([1.0, 1.0, 1.0, 0.0]))]).values[0]
    assert row[0] == 0
    assert not any(value <= 1e30 for value in row[1:])


def findings(kl: list[float]) -> HeadFindings:
    table = torch.zeros(len(kl), len(COLUMNS), dtype=torch.float64)
    table[:, COLUMNS.index("kl")] = torch.tensor(kl, dtype=torch.float64)
    table[:, COLUMNS.index("kl_reverse")] = torch.arange(len(kl)).flip(0)
    table[:, COLUMNS.index("token")] = 1000 + torch.arange(len(kl))
    table[:, COLUMNS.index("probability")] = torch.arange(len(kl)) / 100
    places = torch.arange(len(kl))
    tables = {"free": table.flip(0), "replayed": table}
    return HeadFindings(tables, places * 0.0, 2000 + places, places / 200, places, error=0.0)


def test_worst_tokens() -> None:
    kl = [0.0] * 80
    kl[7], kl[45], kl[79], kl[30] = 0.5, math.nan, 2.0, 0.5
    tokens = Tokens(torch.arange(100, 180).view(2, 40), "some", None)
    worst = worst_tokens(findings(kl), tokens)
    assert [(one.sequence, one.position) for one in worst] == [(1, 5), (1, 39), (0, 7), (0, 30)]
    assert math.isnan(worst[0].kl)
    assert [one.kl for one in worst[1:]] == [2.0, 0.5, 0.5]
    assert worst[0].context == "140 141 142 143 144 145"  # not from the sequence before
    assert worst[1].context == " ".join(map(str, range(156, 180)))
    assert (worst[1].reference, worst[1].candidate) == ("2079", "1079")
    assert (worst[1].reference_probability, worst[1].candidate_probability) == pytest.approx((0.395, 0.79))


def test_worst_tokens_are_twenty_and_text() -> None:
    kl = [(7 * place) % 80 / 10 for place in range(80)]
    decoder = SimpleNamespace(decode=lambda ids: "+".join(map(str, ids)))
    tokens = Tokens(torch.arange(80).view(2, 40), "some", decoder)
    worst = worst_tokens(findings(kl), tokens)
    assert [one.kl for one in worst] == pytest.approx([place / 10 for place in range(79, 59, -1)])
    assert all(one.kl == kl[40 * one.sequence + one.position] for one in worst)
    assert worst[0].context.endswith(f"+{40 * worst[0].sequence + worst[0].position}")
    assert worst_tokens(findings([0.0] * 80), tokens) == ()


HIDDEN = 6


class Ranks:
    """Ranks that run one after the other: the last one gets the sums of all."""

    def __init__(self, world_size: int) -> None:
        self.rank, self.world_size = 0, world_size
        self._sums: list[torch.Tensor] = []
        self._calls = 0

    def next(self) -> None:
        self.rank, self._calls = self.rank + 1, 0

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        if self._calls == len(self._sums):
            self._sums.append(torch.zeros_like(values))
        self._sums[self._calls] += values
        self._calls += 1
        return self._sums[self._calls - 1].clone()


def run_head(
    monkeypatch, size: int, world_size: int
) -> tuple[HeadFindings, dict[str, torch.Tensor], list[int]]:
    """`_Comparison`'s work on the logits of made-up states with four runs; heads that just multiply."""
    random = torch.Generator().manual_seed(11)
    hidden = [torch.randn(3, 9, HIDDEN, generator=random, dtype=torch.float64) for _ in range(5)]
    weights = [torch.randn(VOCAB_SIZE, HIDDEN, generator=random, dtype=torch.float64) for _ in range(2)]
    targets = torch.randint(VOCAB_SIZE, (3, 9), generator=random)
    targets[:, -1] = -1
    seen: list[int] = []

    def head(weight: torch.Tensor) -> SimpleNamespace:
        def logits(states: torch.Tensor) -> torch.Tensor:
            seen.append(len(states))
            return (states.unsqueeze(1) * weight).sum(2)  # row by row: the same in chunks of any size

        return SimpleNamespace(logits=logits)

    ranks = Ranks(world_size)
    settings = SimpleNamespace(dims=SimpleNamespace(vocab_size=VOCAB_SIZE))
    model = SimpleNamespace(ranks=ranks, device=torch.device("cpu"), settings=settings)
    comparison = object.__new__(logits_run._Comparison)
    comparison._models = model, model
    monkeypatch.setattr(logits_run, "chunk_size", lambda vocab_size: size * (vocab_size == VOCAB_SIZE))
    states = States([hidden[0], hidden[3], hidden[4]], [hidden[1], hidden[2]])
    for _ in range(world_size):
        found = comparison._compare_logits(states, [head(weight) for weight in weights], targets)
        ranks.next()
    ours, theirs = weights
    logits = {
        "reference": hidden[0] @ ours.T,
        "replayed": hidden[1] @ theirs.T,
        "free": hidden[2] @ theirs.T,
        "noise_replayed": hidden[3] @ ours.T,
        "noise_free": hidden[4] @ ours.T,
        "local": hidden[0] @ theirs.T,
    }
    return (
        found,
        {name: values.flatten(0, 1) for name, values in logits.items()} | {"targets": targets.flatten()},
        seen,
    )


@pytest.mark.parametrize(
    ("size", "world_size"), [(100, 1), (27, 1), (4, 1), (1, 1), (4, 2), (5, 3), (100, 2)]
)
def test_chunks_and_ranks(monkeypatch, size: int, world_size: int) -> None:
    """Every run has its own hidden states and the right head; every token is compared once."""
    found, given, seen = run_head(monkeypatch, size, world_size)
    targets = given["targets"].tolist()
    reference = given["reference"].numpy()
    assert list(found.tables) == ["replayed", "free", "noise_replayed", "noise_free"]
    for run, table in found.tables.items():
        for place, row in enumerate(table.tolist()):
            expected = expected_row(reference[place], given[run][place].numpy(), targets[place])
            assert dict(zip(COLUMNS, row, strict=True)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    own = [expected_row(row, row, target) for row, target in zip(reference, targets, strict=True)]
    assert found.loss_T.tolist() == pytest.approx([row["loss"] for row in own], rel=1e-9)
    assert found.best_T.tolist() == [row["token"] for row in own]
    assert found.probability_T.tolist() == pytest.approx([row["probability"] for row in own], rel=1e-9)
    assert found.targets_T.tolist() == targets
    apart = np.square(given["local"].numpy() - reference).sum() / np.square(reference).sum()
    assert found.error == pytest.approx(math.sqrt(apart), rel=1e-6)
    assert sum(seen) == 6 * len(targets)
    assert max(seen) <= size


@pytest.fixture(scope="module")
def models(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model in BF16, and in INT4 with its conversion back."""
    folder = tmp_path_factory.mktemp("metrics")
    dsv3_tools.convert_fp8_to_bf16(miniature, folder / "bf16", device="cpu")
    dsv3_tools.quantize_int4(miniature, folder / "int4", device="cpu")
    dsv3_tools.convert_int4_to_bf16(folder / "int4", folder / "int4 in bf16", device="cpu")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def ids(miniature: Path) -> torch.Tensor:
    return load_file(miniature.with_name("heldout_tokens.safetensors"))["tokens"].long()[:2, :128]


@pytest.fixture(scope="module")
def theirs(models: dict[str, Path], ids: torch.Tensor) -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """The logits that transformers' modules give for tokens 1... and, from MTP, for tokens 2...."""
    from miniature.export import from_released, read_checkpoint
    from miniature.model import predict

    with torch.no_grad():
        found = {
            name: predict(*from_released(read_checkpoint(models[name])), ids)
            for name in ("bf16", "int4 in bf16")
        }
    return found.__getitem__


def verify(models: dict[str, Path], candidate: str, **options) -> dsv3_tools.LogitsReport:
    heldout = Path(__file__).parents[2] / "miniature" / "heldout_tokens.safetensors"
    options = {"tokens": heldout, "length": 128, "max_tokens": 256, "device": "cpu", "dtype": "F32"} | options
    return dsv3_tools.verify_logits(models["bf16"], models[candidate], baseline=False, **options)


@pytest.fixture(scope="module")
def report(models: dict[str, Path]) -> dsv3_tools.LogitsReport:
    return verify(models, "int4")


def perplexity_of(logits: torch.Tensor, targets: torch.Tensor) -> float:
    rows = zip(logits.flatten(0, 1).numpy(), targets.flatten().tolist(), strict=True)
    losses = [-log_softmax(row)[target] for row, target in rows]
    return math.exp(sum(losses) / len(losses))


def test_perplexities_are_transformers(models, theirs, ids) -> None:
    report = verify(models, "bf16")
    main, ahead = theirs("bf16")
    expected, mtp = perplexity_of(main, ids[:, 1:]), perplexity_of(ahead, ids[:, 2:])
    assert (report.num_sequences, report.length) == tuple(ids.shape)
    assert report.perplexity == pytest.approx(expected, rel=1e-4)
    for run in ("replayed", "free"):
        assert report.runs[run].perplexity == pytest.approx(expected, rel=1e-4)
        assert report.mtp[0][run].perplexity == pytest.approx(mtp, rel=1e-4)
    assert perplexity_of(main[:, :-1], ids[:, 2:]) > 2 * expected  # of the wrong tokens
    assert abs(mtp / expected - 1) > 1e-2


def test_the_candidates_perplexities_are_transformers(report, theirs, ids) -> None:
    """By its own choice of experts; with the reference's it is another one."""
    main, ahead = theirs("int4 in bf16")
    expected, mtp = perplexity_of(main, ids[:, 1:]), perplexity_of(ahead, ids[:, 2:])
    assert report.runs["free"].perplexity == pytest.approx(expected, rel=1e-4)
    assert report.mtp[0]["free"].perplexity == pytest.approx(mtp, rel=1e-4)
    assert report.perplexity == pytest.approx(perplexity_of(theirs("bf16")[0], ids[:, 1:]), rel=1e-4)
    assert abs(report.runs["free"].perplexity / report.perplexity - 1) > 1e-3
    assert abs(report.runs["replayed"].perplexity / expected - 1) > 1e-3


def test_results_do_not_depend_on_the_size_of_chunks(models, report, monkeypatch) -> None:
    sizes = []
    monkeypatch.setattr(logits_run, "chunk_size", lambda vocab_size: sizes.append(vocab_size) or 37)
    other = verify(models, "int4")
    assert sizes == [2048, 2048]
    pairs = [(report.runs, other.runs), (report.mtp[0], other.mtp[0])]
    for one, two in pairs:
        for run in ("replayed", "free"):
            assert dataclasses.asdict(two[run]) == pytest.approx(dataclasses.asdict(one[run]), rel=1e-9), run
    assert other.perplexity == pytest.approx(report.perplexity, rel=1e-9)
    assert other.histogram == report.histogram
