"""Makes `huggingface_hub` talk to a hub on this machine: in this process, or in one that is started."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.utils import _http

if TYPE_CHECKING:
    import pytest

SWITCHES = {
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def environment(url: str, home: Path, token: str | None = None) -> dict[str, str]:
    """This process's environment for one that is to use the hub at `url`, with its cache below `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    places = {"HF_ENDPOINT": url, "HF_HOME": str(home)}
    return {**kept, **SWITCHES, **places, **({"HF_TOKEN": token} if token else {})}


def redirect(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> list[float]:
    """Points this process's huggingface_hub at the hub: no token, no bars, and waits that it only notes.

    It reads the environment when it is imported, and parts of it copy what it found; hence the list.

    Returns:
        The seconds that the client would have waited before it tried again, as they come.
    """
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    for name, value in SWITCHES.items():
        monkeypatch.setenv(name, value)
    constants = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_OFFLINE": False,
    }
    for name, constant in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, constant)
    copies = {
        ("utils.tqdm", "HF_HUB_DISABLE_PROGRESS_BARS"): True,
        ("utils._cache_manager", "HF_HUB_CACHE"): str(home / "hub"),
        ("utils._git_credential", "ENDPOINT"): url,
    }
    for (module, name), copy in copies.items():
        monkeypatch.setattr(importlib.import_module("huggingface_hub." + module), name, copy)
    # The package's functions are the methods of one object that was made on import.
    monkeypatch.setattr(importlib.import_module("huggingface_hub.hf_api").api, "endpoint", url)
    _http.close_session()
    return note_waits(monkeypatch)


def note_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the client's waits before it tries again, and lists them."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(0.001)

    clock = SimpleNamespace(**{**vars(time), "sleep": sleep})
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(importlib.import_module("huggingface_hub." + module), "time", clock)
    return waits
