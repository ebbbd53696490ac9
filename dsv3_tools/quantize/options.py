"""What a user may say of a calibrated quantization, and the maker that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import HubRepo, SourceLike, parse_source
from dsv3_tools.conversion.devices import resolve_devices
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.ranks import ALONE, Ranks
from dsv3_tools.errors import UsageError
from dsv3_tools.quantize.recipe import Recipe

if TYPE_CHECKING:
    from dsv3_tools.quantize.calibrator import Calibrator
    from dsv3_tools.quantize.tokens import Calibration

__all__ = ["COMPUTE_DTYPES", "Calibrating", "Prepared", "calibrating_of"]

COMPUTE_DTYPES = ("F32", "BF16")
"""Types of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """Options of `--method gptq` and `--method rtn-weighted`.

    Attributes:
        method: one of `recipe.METHODS`.
        data: a file, see `read_calibration`; None is the text that comes along.
        length: tokens of a sequence.
        max_tokens: of all sequences.
        damping: of Hessians, as a part of their diagonal's mean.
        dtype: of the forward pass; None is BF16 on a GPU and F32 on a CPU.
        memory: bytes that hidden states may take in memory; None is a part of what is free.
        save_every: layers after which hidden states are saved.
        device: as for any run.
        ranks: as for any run.
    """

    method: str = "gptq"
    data: Path | None = None
    length: int | None = None
    max_tokens: int | None = None
    damping: float = 0.01
    dtype: str | None = None
    memory: int | None = None
    save_every: int = 4
    device: str = "auto"
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in COMPUTE_DTYPES:
            raise UsageError(f"--dtype {self.dtype}: expected {' or '.join(COMPUTE_DTYPES)}")
        if self.method == "rtn-weighted" and self.damping != Calibrating.damping:
            raise UsageError(f"--damping {self.damping}: --method rtn-weighted has no use for it")
        if self.save_every < 1:
            raise UsageError(f"--save-every {self.save_every}: expected at least 1")

    def check_source(self, source: SourceLike) -> None:
        """Refuses what a forward pass cannot read.

        Raises:
            UsageError: a model on the Hub.
        """
        where = parse_source(source)
        if isinstance(where, HubRepo):
            raise UsageError(
                f"--method {self.method}: {where} is on the Hub, and calibration goes through the whole "
                f"model; download it first: hf download {where.name}"
            )

    def prepare(self, checkpoint: Checkpoint) -> Prepared:
        """Returns recipe and tokens for a checkpoint.

        Raises:
            CheckpointError: the data cannot be used.
            UsageError: options that make no sense, or no such device.
        """
        # Imported here: help texts and runs without calibration need nothing of a forward pass.
        from dsv3_tools.quantize.arithmetic import kind_of_device
        from dsv3_tools.quantize.tokens import read_calibration

        recipe = Recipe(self.method, self.damping)
        devices = resolve_devices(self.device, self.ranks)
        if len(devices) > 1 and self.device not in ("auto", "cuda"):
            raise UsageError(
                f"--device {self.device}: one process calibrates on one GPU; for {len(devices)}, run "
                f"torchrun --nproc-per-node {len(devices)} --no-python dsv3 quantize ... --device cuda"
            )
        dtype = self.dtype or ("F32" if devices[0] == "cpu" else "BF16")
        data = read_calibration(
            checkpoint,
            self.data,
            length=self.length,
            max_tokens=self.max_tokens,
        )
        return Prepared(self, recipe, data, dtype, kind_of_device(devices[0]))


@dataclass(frozen=True)
class Prepared:
    """A recipe with tokens, for one checkpoint."""

    options: Calibrating
    recipe: Recipe
    calibration: Calibration
    dtype: str
    device_kind: str

    def record(self) -> dict[str, Any]:
        """Returns what decides the bytes of the result, for plan and manifest."""
        from dsv3_tools.quantize.arithmetic import torch_version

        return {
            **self.recipe.record(),
            "tokens": dict(self.calibration.record()),
            "dtype": self.dtype,
            "device": self.device_kind,
            "torch": torch_version(),
        }

    def maker(self, plan: Plan, checkpoint: Checkpoint) -> Calibrator:
        """Returns what makes the plan's weights."""
        from dsv3_tools.quantize.calibrator import Calibrator

        return Calibrator(
            plan,
            checkpoint,
            self.calibration,
            self.recipe,
            self.dtype,
            self.options.memory,
            self.options.save_every,
            self.options.ranks.world_size,
        )


def calibrating_of(method: str, *, nonfinite: str, **options: Any) -> Calibrating | None:
    """Returns the options of a calibrated run; None for one that rounds to the nearest code.

    Raises:
        UsageError: calibration data for a method that has no use for it.
    """
    if method != "rtn":
        if nonfinite != "error":
            raise UsageError(f"--nonfinite {nonfinite}: --method {method} cannot go on over NaN and infinity")
        return Calibrating(method=method, **options)
    given = [
        name for name in ("data", "length", "max_tokens", "dtype", "memory") if options[name] is not None
    ]
    given += [name for name in ("damping", "save_every") if options[name] != getattr(Calibrating, name)]
    if given:
        name = "calibration" if given[0] == "data" else given[0].replace("_", "-")
        raise UsageError(f"--{name} {options[given[0]]}: --method rtn has no use for it; say --method gptq")
    return None
