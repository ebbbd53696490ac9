"""Several ranks compute what one does, and share one fate."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dsv3_tools
from dsv3_tools import Checkpoint
from dsv3_tools.errors import CheckpointError, Dsv3Error, UsageError
from dsv3_tools.model.launch import run_ranks
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.model.transformer import Transformer
from tests.model.models import bound, check_within, make, run_both, some_tokens


def work(ranks: RankGroup, device: str, report, directories, tokens: torch.Tensor):
    """Logits and MTP logits of every model, and what was read for it."""
    results = []
    for directory in directories:
        read: list[str] = []
        with Checkpoint(directory) as checkpoint:
            model = Transformer(checkpoint, device=device, ranks=ranks)
            load = model._source.load

            def noted(prepared, reader, load=load, read=read):
                read.extend(part.wanted.name for part in prepared.slices.values())
                return load(prepared, reader)

            model._source.load = noted
            results.append(run_both(model, tokens))
            report((ranks.rank, read))
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """BF16 with numbers of heads and experts that two doesn't divide; FP8, INT8, INT4 whose shares cut
    blocks, groups, and words of zero points."""
    folder = tmp_path_factory.mktemp("parallel")
    ragged = {"num_attention_heads": 3, "num_key_value_heads": 3, "n_routed_experts": 15, "n_group": 3}
    random = make(folder / "bf16", ragged | {"moe_intermediate_size": 41})
    sizes = {"hidden_size": 256, "intermediate_size": 320, "moe_intermediate_size": 64, "n_shared_experts": 3}
    sizes |= {"q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32}
    plain = make(folder / "plain", sizes)
    dsv3_tools.convert_bf16_to_fp8(plain, folder / "fp8", device="cpu")
    dsv3_tools.quantize_int8(plain, folder / "int8", scheme="block", device="cpu")
    more = {"group_size": 32, "include": ["*self_attn*", "*shared_experts*", "*.0.mlp.*"]}
    dsv3_tools.quantize_int4(plain, folder / "int4", symmetric=False, device="cpu", **more)
    dsv3_tools.quantize_int4(plain, folder / "gptq", layout="gptq", device="cpu", **more)
    return [random, *(folder / name for name in ("fp8", "int8", "int4", "gptq"))]


def test_two_ranks_are_one_within_the_bound(models: list[Path]) -> None:
    """The bound is that of two implementations: only the order of sums differs."""
    tokens = some_tokens(2, 24)
    read: dict[int, list[list[str]]] = {0: [], 1: []}

    def noted(report) -> None:
        read[report[0]].append(report[1])

    found = run_ranks(work, ["cpu", "cpu"], models, tokens, on_report=noted)
    for directory, logits in zip(models, found, strict=True):
        with Checkpoint(directory) as checkpoint:
            alone = run_both(Transformer(checkpoint), tokens)
        check_within(logits, alone, bound(directory, tokens, run_both))
    for one, other in zip(read[0], read[1], strict=True):
        experts = [{name for name in names if ".experts." in name} for names in (one, other)]
        assert experts[0]
        assert experts[1]
        assert not experts[0] & experts[1]


@pytest.mark.parametrize("world_size", [3, 5])
def test_shares_add_up(models: list[Path], world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes: what the ranks add to the hidden states is, in sum, what one adds."""
    tokens = some_tokens(1, 16)
    monkeypatch.setattr(RankGroup, "sum_", lambda _, values: values)
    for directory in models if world_size == 3 else models[:1]:
        with Checkpoint(directory) as checkpoint:
            whole, parts = Transformer(checkpoint), []
            hidden = whole.embed(tokens)
            expected = [layer.forward(hidden) for _, layer in whole.layers()]
            for rank in range(world_size):
                model = Transformer(checkpoint, ranks=RankGroup(rank, world_size))
                parts.append([layer.attention(hidden) - hidden for _, layer in model.layers()])
            attended = [layer.attention(hidden) - hidden for _, layer in whole.layers()]
            for layer, one in enumerate(attended):
                assert torch.allclose(sum(part[layer] for part in parts), one, atol=1e-5)
            mlp_parts = [
                [
                    layer.mlp(hidden, routes=expected[number][1])[0] - hidden
                    for number, layer in Transformer(checkpoint, ranks=RankGroup(rank, world_size)).layers()
                ]
                for rank in range(world_size)
            ]
            for number, layer in whole.layers():
                one = layer.mlp(hidden, routes=expected[number][1])[0] - hidden
                assert torch.allclose(sum(part[number] for part in mlp_parts), one, atol=1e-5)


def fail_in_one(ranks: RankGroup, device: str, report, how: str):
    if ranks.rank == 1:
        if how == "die":
            os._exit(9)
        raise CheckpointError("tensor x is missing") if how == "refuse" else ZeroDivisionError("oops")
    ranks.sum_(torch.ones(3))  # waits for the other


@pytest.mark.parametrize(
    ("how", "message", "code"),
    [
        ("refuse", "rank 1: tensor x is missing", 3),
        ("crash", "rank 1: Traceback(?s:.*)ZeroDivisionError: oops", 1),
    ],
)
def test_a_failing_rank_ends_all(how: str, message: str, code: int) -> None:
    began = time.monotonic()
    with pytest.raises(Dsv3Error, match=message) as caught:
        run_ranks(fail_in_one, ["cpu", "cpu"], how)
    assert caught.value.exit_code == code
    assert time.monotonic() - began < 30


def test_a_killed_rank_ends_all() -> None:
    with pytest.raises(Dsv3Error, match=r"rank [01]"):
        run_ranks(fail_in_one, ["cpu", "cpu"], "die")


def wait_forever(ranks: RankGroup, device: str, report) -> None:
    report("here")
    time.sleep(600)


def test_the_caller_can_end_all() -> None:
    here: list[object] = []

    def check() -> None:
        if here:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ranks(wait_forever, ["cpu", "cpu"], on_report=here.append, check=check)


def test_no_devices() -> None:
    with pytest.raises(UsageError):
        run_ranks(work, [])


def test_shares() -> None:
    for count, world_size in [(7, 3), (2, 5), (256, 8), (0, 2)]:
        parts = [RankGroup(rank, world_size).share(count) for rank in range(world_size)]
        assert [n for part in parts for n in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


SCRIPT = """
import sys, torch
from dsv3_tools import Checkpoint
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.model.transformer import Transformer
ranks = RankGroup.join(torch.device("cpu"))
assert ranks.world_size == 2
model = Transformer(Checkpoint(sys.argv[1]), ranks=ranks)
hidden = model.embed(torch.arange(12).view(1, 12))
for _, layer in model.layers():
    hidden, _ = layer.forward(hidden)
torch.save(hidden, f"{sys.argv[2]}/{ranks.rank}.pt")
"""


def test_torchrun(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        done = subprocess.run(
            [*command, str(tmp_path / "script.py"), str(models[0]), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*ranks)
    with Checkpoint(models[0]) as checkpoint:
        model = Transformer(checkpoint)
        hidden = model.embed(torch.arange(12).view(1, 12))
        for _, layer in model.layers():
            hidden, _ = layer.forward(hidden)
    assert torch.allclose(ranks[0], hidden, atol=1e-4)


def give_tensors(ranks: RankGroup, device: str, report) -> list[torch.Tensor]:
    report(torch.full((100,), float(ranks.rank)))
    return [torch.arange(1000) + ranks.rank]


def test_tensors_arrive_from_ranks_that_have_ended() -> None:
    """A caller who is busy with a report takes the results when their senders are gone."""
    reports = []

    def slowly(report) -> None:
        reports.append(float(report.mean()))
        time.sleep(2)

    (found,) = run_ranks(give_tensors, ["cpu", "cpu"], on_report=slowly)
    assert torch.equal(found, torch.arange(1000))
    assert sorted(reports) == [0.0, 1.0]
