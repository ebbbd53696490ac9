"""What several tests share: a small checkpoint in both layouts, and which tests this machine can run."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.hub.server import FakeHub

ROOT = Path(__file__).resolve().parents[1]

SMALL = {
    "first_k_dense_replace": 1,
    "hidden_size": 192,
    "intermediate_size": 320,
    "kv_lora_rank": 96,
    "moe_intermediate_size": 64,
    "n_group": 2,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 144,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "topk_group": 1,
    "v_head_dim": 32,
    "vocab_size": 160,
}
"""Dimensions with partial blocks along both axes, several blocks, a dense layer, two MoE layers and MTP."""

UPLOAD_WARNING = "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
"""What httpx2 says about how huggingface_hub sends large objects."""

SIDE_FILES = {
    "LICENSE": "MIT\n",
    "chat_template.jinja": "{{ messages }}\n",
    "generation_config.json": "{}\n",
    "modeling_deepseek.py": "raise SystemExit('nothing imports this file')\n",
    "tokenizer.json": "{}\n",
}


def pytest_configure() -> None:
    """Shares the processors among pytest-xdist's workers: threads that outnumber them wait for each other.

    Before anything imports torch or NumPy; the processes that tests start inherit it.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs more GPUs than there are, and says so; lets huggingface_hub upload the way it does."""
    for item in items:
        if "hub" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings(UPLOAD_WARNING))
    needed = {"gpu": 1, "multi_gpu": 2}
    marked = [
        (item, count) for item in items for marker, count in needed.items() if item.get_closest_marker(marker)
    ]
    if not marked:
        return
    import torch

    found = torch.cuda.device_count()
    for item, count in marked:
        if found < count:
            item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA devices, this machine has {found}"))


def pytest_collection_finish() -> None:
    """Takes the modules and tests, which stay, out of the collector's sight: looking at them takes 0.5 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FP8 checkpoint in four shards with tokenizer and the like; must not be written to."""
    import dsv3_tools

    path = tmp_path_factory.mktemp("shared") / "small-fp8"
    dsv3_tools.sample(path, overrides=SMALL, shards=4, seed=3)
    for name, text in SIDE_FILES.items():
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="session")
def bf16_checkpoint(fp8_checkpoint: Path) -> Path:
    """The same checkpoint converted to BF16, with its manifest; must not be written to."""
    import dsv3_tools

    path = fp8_checkpoint.with_name("small-bf16")
    dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, path, device="cpu")
    return path


@pytest.fixture(scope="session")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3's headers over holes instead of data; must not be written to."""
    import dsv3_tools

    path = tmp_path_factory.mktemp("shared") / "v3"
    dsv3_tools.sample(path, sparse=True)
    return path


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that copies a checkpoint to where the test may damage it."""

    def copy(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / "copied", symlinks=True))

    return copy


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The shipped model in FP8, whose weights are trained; must not be written to."""
    return ROOT / "miniature" / "checkpoint"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub without repos; the test fails if the hub itself made a mistake."""
    from huggingface_hub.utils import _http

    from tests.hub.server import FakeHub

    with FakeHub() as serving:
        yield serving
    _http.close_session()
    assert not serving.errors, "\n".join(serving.errors)


@pytest.fixture
def waits(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, hub_home: Path) -> list[float]:
    """Plain calls of huggingface_hub use `hub`, and this lists the waits they skip before another attempt."""
    from dsv3_tools.checkpoint import hub_requests
    from tests.hub.client import redirect

    skipped = redirect(monkeypatch, hub.url, hub_home)

    def note(seconds: float, check: Callable[[], None]) -> None:
        check()
        skipped.append(seconds)

    monkeypatch.setattr(hub_requests, "_wait", note)
    return skipped


@pytest.fixture
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where huggingface_hub keeps its cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def client(waits: list[float]) -> None:
    """As `waits`, for tests that ask for no list."""
