"""Signals, workers that fail, and memory that runs out: a clean end, or the same bytes another way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from dsv3_tools.conversion import crew
from dsv3_tools.conversion.pipeline_cpu import CpuPipeline
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import DestinationError, Dsv3Error, Interrupted

SLOWLY = """
import signal
# Whoever started the tests may ignore some (nohup does); a run would respect that.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
import os, time
from dsv3_tools.cli import main
pwrite, count = os.pwrite, 0
def slowly(*args):
    global count
    count += 1
    time.sleep(0.05 if count > 30 else 0)
    return pwrite(*args)
os.pwrite = slowly
main()
"""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def chosen(cases):
    """One command of each kind; how a run ends does not depend on what it writes."""
    return [cases[name] for name in ("fp8-to-bf16", "bf16-to-fp8-like", "quantize-int4")]


def test_signals_end_a_run_cleanly(cases, tools, tmp_path):
    """A signal for each conversion, all at once: most of the time goes into starting the processes."""
    runs = {}
    for signum, case in zip(SIGNALS, chosen(cases), strict=True):
        command = [sys.executable, "-c", SLOWLY, *case.arguments(tmp_path / signum.name), "--workers", "1"]
        runs[signum] = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    for signum, run in runs.items():
        journal, deadline = tmp_path / signum.name / ".dsv3" / "journal.jsonl", time.monotonic() + 60
        while not journal.exists() and time.monotonic() < deadline:
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.02)
        run.send_signal(signum)
    for (signum, run), case in zip(runs.items(), chosen(cases), strict=True):
        out, began = tmp_path / signum.name, time.monotonic()
        _, errors = run.communicate(timeout=30)
        assert time.monotonic() - began < 10
        assert run.returncode == 128 + signum, errors
        assert "Traceback" not in errors
        assert f"to go on, run again: dsv3 {' '.join(case.arguments(out))}" in " ".join(errors.split())
        assert not tools.violations(out, case.expected)
        assert not list(out.glob(".dsv3/*.tmp"))
        kept = tools.journalled(out)
        assert kept
        result = tools.convert_quickly(case, out)
        assert result.shards_resumed == len(kept)
        assert {name: tools.identity(out / name) for name in kept} == kept
        assert not tools.is_same(tools.snapshot(out), case.expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_stop_at_any_moment(case, tools, tmp_path, chance, workers):
    for number in range(15):
        out, stop = tmp_path / str(number), Stop()
        left = [chance.randrange(30)]

        def count_down(_progress, stop=stop, left=left) -> None:
            left[0] -= 1
            if left[0] < 0:
                stop.set(signal.SIGTERM)

        with (
            tools.interposed(tools.unsynced, ("fsync",)),
            pytest.raises(Interrupted, match="the same command goes on from there") as caught,
        ):
            case.convert(out, stop=stop, on_progress=count_down, workers=workers)
        assert caught.value.exit_code == 143
        assert not tools.violations(out, case.expected)
        assert not list(out.glob(".dsv3/*.tmp"))
        tools.convert_quickly(case, out)
        assert not tools.is_same(tools.snapshot(out), case.expected)


def test_stop_before_it_begins(case, tools, tmp_path):
    stop = Stop()
    stop.set(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        case.convert(tmp_path / "out", stop=stop)
    assert caught.value.exit_code == 130
    tools.convert_quickly(case, tmp_path / "out")
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), case.expected)


@pytest.mark.parametrize(
    "error", [ValueError("odd"), MemoryError("none left"), RuntimeError("kernel")], ids=repr
)
def test_worker_that_fails_names_its_shard(case, tools, tmp_path, monkeypatch, error):
    """The others stop at their next piece instead of finishing hours of work first."""
    started = threading.Barrier(2)
    process = CpuPipeline._process
    pieces = []

    def fail_in_second(self, piece, writer, policy):
        if "00002" in writer._final.name:
            started.wait(10)
            raise error
        pieces.append(piece)
        if len(pieces) == 1:
            started.wait(10)
            while not self._stop.is_set:
                time.sleep(0.01)
        process(self, piece, writer, policy)

    monkeypatch.setattr(CpuPipeline, "_process", fail_in_second)
    message = f"model-00002-of-000003.safetensors: the worker on this shard failed: {type(error).__name__}"
    with pytest.raises(Dsv3Error, match=message):
        case.convert(tmp_path / "out", workers=2)
    assert len(pieces) == 1
    assert not tools.violations(tmp_path / "out", case.expected)
    assert not list(tmp_path.glob("out/.dsv3/*.tmp"))
    assert threading.active_count() < 5
    monkeypatch.undo()
    tools.convert_quickly(case, tmp_path / "out")
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), case.expected)


def test_worker_that_cannot_be_hired(case, tools, tmp_path, monkeypatch):
    def refuse(self, *_):
        raise RuntimeError("no such device")
        yield

    monkeypatch.setattr(crew.Crew, "_pipelines", refuse)
    with pytest.raises((Dsv3Error, RuntimeError), match="no such device"):
        case.convert(tmp_path / "out")


class Starving(CpuPipeline):
    """A pipeline whose device runs out of memory after some pieces, as a GPU's may at any kernel."""

    patience = 5
    closed = 0

    def _process(self, piece, writer, policy):
        self.patience -= 1
        if self.patience < 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        super()._process(piece, writer, policy)

    def close(self) -> None:
        type(self).closed += 1


def starve(monkeypatch, times: int) -> type[Starving]:
    """Puts `times` starving pipelines before the usual one; returns their class, which counts."""
    usual = crew.Crew._pipelines
    kind = type("Starving", (Starving,), {"closed": 0})

    def pipelines(self, device, meter):
        for _ in range(times):
            yield kind(self._checkpoints, self._stop, meter, workers=1)
        yield from usual(self, device, meter)

    monkeypatch.setattr(crew.Crew, "_pipelines", pipelines)
    return kind


@pytest.mark.parametrize("workers", [1, 3])
def test_out_of_device_memory(case, tools, tmp_path, monkeypatch, workers):
    kind = starve(monkeypatch, times=3)
    tools.convert_quickly(case, tmp_path / "out", workers=workers)
    assert 3 <= kind.closed <= 3 * workers  # a worker that finds no shard left starves no more
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), case.expected)


def test_elements_are_counted_once_when_a_shard_is_done_again(fp8_case, tools, tmp_path, monkeypatch):
    """NaNs seen before the memory ran out are seen again."""
    tools.poke(fp8_case.source, "model.layers.0.input_layernorm.weight", 1, b"\xc0\x7f")
    starve(monkeypatch, times=2)
    result = tools.convert_quickly(fp8_case, tmp_path / "out", nonfinite="keep")
    assert result.nonfinite == {"model.layers.0.input_layernorm.weight": 1}


def test_first_failure_is_reported(case, tools, tmp_path):
    """A disk that fails under every worker gives one error, not the last of many."""

    def hook(name, real, args, kwargs):
        raise OSError(28, os.strerror(28))

    with (
        tools.interposed(hook, ("pwrite",)),
        pytest.raises(DestinationError, match=r"model-0000\d.*No space left on device; free some space"),
    ):
        case.convert(tmp_path / "out", workers=3)
    assert not list(tmp_path.glob("out/.dsv3/*.tmp"))


def test_nohup_is_respected(monkeypatch):
    """A signal that is ignored when the run begins stays ignored."""
    import signal

    from dsv3_tools.cli.signals import stop_on_signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set
            assert stop.signum == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
