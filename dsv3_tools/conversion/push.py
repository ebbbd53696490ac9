"""`dsv3 push`: a finished checkpoint goes to the Hub, its index and card in the last commit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.deepseek_infer import check_ranks, holds_ranks
from dsv3_tools.checkpoint.index import INDEX_NAME
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME, PUSH_NAME
from dsv3_tools.checkpoint.paths import regular_file
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.card_yaml import CARD_NAME, with_text_of
from dsv3_tools.conversion.destination import read_manifest
from dsv3_tools.conversion.hub_target import LAST_MESSAGE, HubTarget, PushTarget
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import CheckpointError

__all__ = ["PushResult", "push", "with_card_there"]

_LAST = (CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, CARD_NAME)
"""What makes shards a model."""

_NEVER = (".*", PUSH_NAME, "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
"""Hidden files, and pickle files, which run code when they are loaded."""

_HASH_NBYTES = 4 << 20


@dataclass(frozen=True)
class PushResult:
    """What was uploaded, or would be.

    Attributes:
        directory: the checkpoint.
        repo: the model on the Hub.
        revision: the branch or pull request.
        commit: the last commit; empty when nothing was uploaded.
        url: the page of the model, or of the pull request.
        files: sizes by name, those of the last commit at the end.
        nbytes: of all files.
        nbytes_there: of those that the Hub had already, as far as the manifest tells.
        left_out: names that are never uploaded.
    """

    directory: Path
    repo: str
    revision: str
    commit: str
    url: str
    files: Mapping[str, int]
    nbytes: int
    nbytes_there: int
    left_out: tuple[str, ...]


def push(
    directory: str | os.PathLike[str],
    repo: str | PushTarget,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    stop: Stop | None = None,
) -> PushResult:
    """Uploads a finished checkpoint to the Hub, or goes on where an interrupted upload stopped.

    Example:
        >>> import dsv3_tools, tempfile
        >>> made = tempfile.mkdtemp()
        >>> _ = dsv3_tools.convert_fp8_to_bf16("miniature/checkpoint", made, device="cpu")
        >>> list(push(made, "my-name/mini-bf16", dry_run=True).files)[-1]
        'README.md'

    Args:
        directory: the checkpoint.
        repo: `org/name` or `org/name@branch`; the model and the branch are made if they are not there.
        revision: the branch, if `repo` does not name it.
        private: make a private model.
        create_pr: propose a pull request instead of writing to main.
        overwrite: replace another model that is there.
        dry_run: only say what would be uploaded.
        stop: lets a signal handler end it.

    Raises:
        CheckpointError: not a finished checkpoint, or a file is not what its manifest says.
        DestinationError: another model is there.
        NetworkError: the Hub cannot be reached, or refuses.
    """
    folder, check = Path(directory), (stop or Stop()).check
    given = repo if isinstance(repo, PushTarget) else PushTarget.parse(repo)
    target = given.with_options(revision=revision, private=private, create_pr=create_pr)
    hashes = _check_finished(folder)
    sizes, left_out = _files(folder)
    hub = HubTarget(target, f"dsv3 push {_label(hashes, sizes)}", check)
    if not dry_run:
        hub.prepare()
    there = hub.files_if_any()
    own = _shards(folder, sizes, hashes, there)
    if not (overwrite and dry_run):
        hub.make_way(there, own, overwrite=overwrite)
    same = [name for name, sha256 in there.items() if sha256 and name in sizes and hashes.get(name) == sha256]
    commit = "" if dry_run else _upload(hub, folder, sizes, hashes)
    return PushResult(
        directory=folder,
        repo=target.repo.name,
        revision=hub.revision or "a new pull request",
        commit=commit,
        url=hub.url,
        files=sizes,
        nbytes=sum(sizes.values()),
        nbytes_there=sum(sizes[name] for name in same),
        left_out=left_out,
    )


def with_card_there(hub: HubTarget, paths: Mapping[str, Path]) -> dict[str, Path | bytes]:
    """Returns the files of a last commit: the card with what its user has written in the one on the Hub."""
    found: dict[str, Path | bytes] = dict(paths)
    there = hub.read_if_any(CARD_NAME) if CARD_NAME in paths else None
    if there is None:
        return found
    found[CARD_NAME] = with_text_of(there, paths[CARD_NAME].read_bytes())
    return {name: content for name, content in found.items() if content != there}


def _upload(hub: HubTarget, folder: Path, sizes: Mapping[str, int], hashes: Mapping[str, str]) -> str:
    """Uploads shards and other files first, then what makes them a model; returns the last commit."""
    last = [name for name in _LAST if name in sizes]
    hub.upload_folder(folder, [name for name in sizes if name not in last])
    hub.check({name: hashes[name] for name in sizes if name in hashes and name.endswith(".safetensors")})
    return hub.commit(with_card_there(hub, {name: folder / name for name in last}), LAST_MESSAGE)


def _check_finished(folder: Path) -> dict[str, str]:
    """Refuses what is no finished checkpoint; returns the SHA-256 that its manifest states, by name.

    Raises:
        CheckpointError: an interrupted conversion, no checkpoint, or a file of another size than it had.
    """
    if not holds_ranks(folder):
        Checkpoint(folder).close()
    else:
        check_ranks(folder)
    if not (folder / MANIFEST_NAME).exists():
        return {}
    files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
    for name, file in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["nbytes"]:
            raise CheckpointError(
                f"{path}: is missing or has another size than the manifest says; to check every file: "
                f"dsv3 verify integrity {folder}"
            )
    return {name: str(file["sha256"]) for name, file in files.items()}


def _files(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns the sizes of what is uploaded, by path, and the names of what never is.

    Raises:
        CheckpointError: a link that leads out of the directory.
    """
    sizes: dict[str, int] = {}
    left_out = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any(part.startswith(".") for part in Path(name).parts[:-1]) or not path.is_file():
            continue
        if any(fnmatch(path.name.lower(), pattern) for pattern in _NEVER):
            left_out.append(name)
        else:
            sizes[name] = regular_file(folder, name).stat().st_size
    order = {name: number for number, name in enumerate(_LAST)}
    return dict(sorted(sizes.items(), key=lambda item: order.get(item[0], -1))), tuple(left_out)


def _shards(
    folder: Path, sizes: Mapping[str, int], hashes: Mapping[str, str], there: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Returns the shards with their SHA-256; what no manifest says is calculated where it is needed."""
    names = [name for name in sizes if name.endswith(".safetensors")]
    return {name: hashes.get(name) or (_sha256(folder / name) if name in there else None) for name in names}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_NBYTES):
            digest.update(block)
    return digest.hexdigest()


def _label(hashes: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Returns a few characters that tell one result from another."""
    return hashlib.sha256(repr(sorted((hashes or sizes).items())).encode()).hexdigest()[:8]
