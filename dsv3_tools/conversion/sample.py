"""Checkpoints of real shapes with random weights: for benchmarks, for planning, for trying things out.

Weights are Gaussian with a standard deviation of 0.02, cut from a pool of random blocks: drawing
billions of numbers would take longer than the conversion that is to be measured. Codes and scales of
a sample are valid and look like those of a trained model; what the model says is noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.architecture import dense_tensors, mtp_copies
from dsv3_tools.checkpoint.config import CONFIG_NAME, ModelConfig, encode_config, with_quantization
from dsv3_tools.checkpoint.durable import destination_errors, write_file
from dsv3_tools.checkpoint.header import encode_header
from dsv3_tools.checkpoint.index import INDEX_NAME, encode_index, shard_name
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.checkpoint.writer import ShardWriter
from dsv3_tools.conversion.preflight import check_room
from dsv3_tools.errors import DestinationError, UsageError
from dsv3_tools.formats import FP8Block

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SampleResult", "sample"]

_POOL_ROWS = 4096
_POOL_COLUMNS = 1024
_CHUNK_NBYTES = 4 << 20
_SHARDS_OF_RELEASE = {"deepseek-v3": 163, "kimi-k2": 61, "moonlight": 27}


@dataclass(frozen=True)
class SampleResult:
    """What was written."""

    destination: Path
    num_shards: int
    num_tensors: int
    nbytes: int


def sample(
    destination: str | os.PathLike[str],
    *,
    preset: str = "deepseek-v3",
    weights: str = "fp8",
    layers: int | None = None,
    experts: int | None = None,
    shards: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    sparse: bool = False,
    seed: int = 0,
) -> SampleResult:
    """Writes a checkpoint with random weights.

    Example:
        >>> import tempfile
        >>> sample(tempfile.mkdtemp(), sparse=True).nbytes
        688574839360

    Args:
        destination: directory to write, empty or absent.
        preset: "deepseek-v3", "kimi-k2" or "moonlight".
        weights: "fp8" for the released FP8 layout, "fp8-ue8m0" for V3.1's scales, "bf16" for BF16.
        layers: number of layers, instead of the model's; the dense layers come first.
        experts: number of routed experts, instead of the model's.
        shards: number of files, fewer where the tensors do not divide so; None is the release's number, or
            one for each 4.3 GB if it is smaller.
        overrides: other keys of `config.json`.
        sparse: only headers; the data are holes that read as zeros and take no room.
        seed: of the random weights.

    Raises:
        UsageError: no such preset or layout.
        DestinationError: not empty, or not writable.
    """
    config_json = _config(preset, layers, experts, overrides or {})
    fmt = _format(weights)
    config = ModelConfig.from_dict(config_json)
    specs = _specs(config, fmt)
    if fmt is not None:
        config_json = with_quantization(config_json, fmt.quantization_config())
    total = sum(spec.nbytes for spec in specs.values())
    whole = layers is None and experts is None and not overrides
    count = shards or (_SHARDS_OF_RELEASE[preset] if whole else max(1, round(total / 4.3e9)))
    folder = Path(destination)
    if not sparse:
        check_room(folder, total)
    with destination_errors(folder, "creating the directory"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise DestinationError(f"{folder}: is not empty; choose another directory")
    groups = _split(specs, total, count)
    pool = None if sparse else _Pool(seed, fmt)
    with _removed_on_failure(folder):
        for number, names in enumerate(groups, start=1):
            shard = {name: specs[name] for name in names}
            _write_shard(folder, shard_name(number, len(groups)), shard, pool, mtp_copies(config))
    weight_map = {n: shard_name(k, len(groups)) for k, names in enumerate(groups, start=1) for n in names}
    parameters = sum(spec.num_elements for name, spec in specs.items() if not name.endswith("_scale_inv"))
    write_file(folder / CONFIG_NAME, encode_config(config_json), folder=folder)
    index = encode_index(weight_map, total_size=total, total_parameters=parameters)
    write_file(folder / INDEX_NAME, index, folder=folder)
    return SampleResult(folder, len(groups), len(specs), total)


def _config(
    preset: str, layers: int | None, experts: int | None, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    if preset not in PRESETS:
        raise UsageError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    config = PRESETS[preset] | dict(overrides)
    if layers is not None:
        config["num_hidden_layers"] = layers
    if experts is not None:
        config["n_routed_experts"] = experts
        config["num_experts_per_tok"] = min(config["num_experts_per_tok"], experts)
        if experts % config["n_group"]:
            config["n_group"] = config["topk_group"] = 1
    return config


def _format(weights: str) -> FP8Block | None:
    formats = {"bf16": None, "fp8": FP8Block(), "fp8-ue8m0": FP8Block(scale_fmt="ue8m0")}
    if weights not in formats:
        raise UsageError(f"weights {weights!r}: expected one of {', '.join(formats)}")
    return formats[weights]


def _specs(config: ModelConfig, fmt: FP8Block | None) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, spec in dense_tensors(config).items():
        parsed = parse_name(name)
        assert parsed is not None, name
        if fmt is not None and parsed.is_fp8_linear:
            specs |= {f"{parsed.prefix}.{part}": found for part, found in fmt.parts(spec.shape).items()}
        else:
            specs[name] = spec
    return specs


def _split(specs: Mapping[str, TensorSpec], total: int, count: int) -> list[list[str]]:
    """Cuts the tensors, in order, into `count` files of about equal size."""
    groups: list[list[str]] = [[] for _ in range(count)]
    position = group = 0
    for name, spec in specs.items():
        if not name.endswith("_scale_inv"):  # a scale stays with the weight before it
            group = min(count - 1, position * count // max(1, total))
        groups[group].append(name)
        position += spec.nbytes
    return [group for group in groups if group]


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Leaves no shards behind when they cannot all be written: a sample is made anew, not resumed."""
    try:
        yield
    except BaseException:
        for path in folder.glob("model-*.safetensors"):
            path.unlink(missing_ok=True)
        raise


def _write_shard(
    folder: Path,
    name: str,
    specs: Mapping[str, TensorSpec],
    pool: _Pool | None,
    copies: Mapping[str, str],
) -> None:
    """Writes one file; tensors among `copies` repeat those that they are copies of."""
    encoded, header = encode_header(specs)
    if pool is None:
        with destination_errors(folder / name, "creating a sparse file"), (folder / name).open("xb") as file:
            file.write(encoded)
            file.truncate(header.file_nbytes)
        return
    with ShardWriter(
        folder / name, folder=folder, label="sample", header=encoded, nbytes=header.file_nbytes
    ) as writer:
        for tensor, spec in header.specs.items():
            for start in range(0, spec.nbytes, _CHUNK_NBYTES):
                nbytes = min(_CHUNK_NBYTES, spec.nbytes - start)
                drawn = pool.draw((tensor, start), copies.get(tensor), spec.dtype, nbytes)
                writer.write(header.offsets[tensor] + start, drawn.data)
        writer.commit()


class _Pool:
    """Random weights in every layout that a sample needs, handed out from random places."""

    def __init__(self, seed: int, fmt: FP8Block | None) -> None:
        import numpy as np
        import torch

        self._random = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(_POOL_ROWS, _POOL_COLUMNS, generator=generator).mul_(0.02).to(torch.bfloat16)
        tensors: Sequence[tuple[str, torch.Tensor]] = [("BF16", weight), ("F32", weight.float())]
        if fmt is not None:
            parts = fmt.encode(weight)
            tensors = [("BF16", weight), ("F8_E4M3", parts["weight"]), ("F32", parts["weight_scale_inv"])]
        self._starts: dict[tuple[str, int], int] = {}
        self._bytes = {dtype: tensor.reshape(-1).view(torch.uint8).numpy() for dtype, tensor in tensors}

    def draw(
        self, place: tuple[str, int], original: str | None, dtype: str, nbytes: int
    ) -> NDArray[np.uint8]:
        """Returns so many bytes of `dtype` for a place in a tensor, beginning at a random element.

        Or, for a copy, at the element that the same place of the original began at.
        """
        import numpy as np

        pool = self._bytes[dtype]
        start = int(self._random.integers(0, pool.size // 8)) * 8
        if original is not None:
            start = self._starts.get((original, place[1]), start)
        self._starts[place] = start
        return np.resize(np.concatenate([pool[start:], pool[:start]]), nbytes)
