"""Weights from a checkpoint in any format, decoded to the type that is computed in.

Only the rows that are wanted are read, widened to what the format keeps together; columns are cut off after
decoding. On the CPU threads that read ahead decode, too; on a GPU they copy the stored bytes there, through a
little pinned memory, and the thread that computes decodes a unit's weights in one launch a format.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import CheckpointError, FormatError
from dsv3_tools.formats.base import Format
from dsv3_tools.formats.dense import Dense
from dsv3_tools.formats.stored import Stored, StoredWeight, find_weights, read_formats
from dsv3_tools.model.module import Module
from dsv3_tools.model.staging import Loaded, Piece, Reader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Encoded", "Prepared", "Supply", "Unit", "Wanted", "WeightSource"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One weight, or some of its rows or columns.

    Attributes:
        name: its tensor name in an unquantized checkpoint.
        rows: None is all.
        columns: None is all.
        is_wide: decoded to float32 (float64 where that is computed in), whatever is computed in.
    """

    name: str
    rows: range | None = None
    columns: range | None = None
    is_wide: bool = False


Unit = Mapping[str, Wanted]
"""What is read, kept and freed together, under the names that the computation has for it."""


class Supply(Protocol):
    """Where a layer has its weights from."""

    def take(self, key: Hashable, unit: Unit) -> dict[str, Tensor]:
        """Returns a unit's weights, decoded.

        Raises:
            CheckpointError: they cannot be read.
        """


class _Slice(NamedTuple):
    """The stored rows around those that are wanted."""

    checkpoint: Checkpoint
    stored: StoredWeight
    wanted: Wanted
    first_row: int
    shape: tuple[int, ...]
    specs: Mapping[str, TensorSpec]
    starts: Mapping[str, int]

    @property
    def key(self) -> tuple[Format, bool]:
        """Weights with the same are decoded together."""
        return self.stored.format, self.wanted.is_wide


class Prepared(NamedTuple):
    """What to read for a unit, and the memory that it takes while it waits: stored on a GPU, else decoded."""

    slices: Mapping[str, _Slice]
    nbytes: int


class Encoded(NamedTuple):
    """A unit in memory, not decoded: per name the parts and which slice of the weight they are."""

    items: Mapping[str, tuple[_Slice, Mapping[str, Tensor]]]
    loaded: Loaded


class WeightSource:
    """The weights of one checkpoint, or of one and its MTP module in another.

    Args:
        checkpoint: open; must stay so.
        module: whose layers take the place of those that `checkpoint` may have itself.
        device: where they are decoded.
        dtype: what they are decoded to.
        through_bf16: rounds them to BF16 on the way; not those that are wide.

    Raises:
        FormatError: the checkpoint's quantization is not known.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        module: Module | None = None,
        device: torch.device,
        dtype: torch.dtype,
        through_bf16: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self._module = module
        self.device = device
        self.dtype = dtype
        self._through_bf16 = through_bf16

    @cached_property
    def _stored(self) -> dict[str, tuple[Checkpoint, StoredWeight]]:
        found = _find(self.checkpoint)
        self._refused = dict(found.refused)
        stored = {weight.full_name: (self.checkpoint, weight) for weight in found.weights}
        if self._module is None:
            return stored
        own = Module(self.checkpoint, {layer: layer for layer in self._module.layers.values()})
        stored = {name: value for name, value in stored.items() if own.full_name(name) is None}
        for weight in _find(self._module.checkpoint).weights:
            if (name := self._module.full_name(weight.full_name)) is not None:
                stored[name] = self._module.checkpoint, weight
        return stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def where(self, name: str) -> tuple[Checkpoint, Format, Mapping[str, str]]:
        """Returns the checkpoint of a weight, its format, and its parts' tensor names."""
        checkpoint, stored = self._stored[name]
        return checkpoint, stored.format, stored.parts

    def prepare(self, unit: Unit) -> Prepared:
        """Returns what to read for a unit.

        Raises:
            CheckpointError: a weight is missing.
            FormatError: its parts are not those of its format.
        """
        slices = {name: self._slice(wanted) for name, wanted in unit.items()}
        if self.device.type == "cpu":
            return Prepared(slices, sum(TensorSpec("F32", part.shape).nbytes for part in slices.values()))
        specs = [spec for part in slices.values() for spec in part.specs.values()]
        return Prepared(slices, sum(spec.nbytes for spec in specs))

    def load(self, prepared: Prepared, reader: Reader) -> Encoded | dict[str, Tensor]:
        """Reads a unit, and decodes it on the CPU; called by any thread.

        Raises:
            CheckpointError: a weight cannot be read.
        """
        pieces = [
            Piece(part.checkpoint, part.stored.parts[name], part.starts[name], spec)
            for part in prepared.slices.values()
            for name, spec in part.specs.items()
        ]
        loaded = reader.read(pieces)
        tensors = iter(loaded.tensors)
        items = {
            name: (part, {part_name: next(tensors) for part_name in part.specs})
            for name, part in prepared.slices.items()
        }
        encoded = Encoded(items, loaded)
        return self.decode(encoded) if self.device.type == "cpu" else encoded

    def decode(self, unit: Encoded | dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a unit's weights, decoded on the current stream if that has not been done yet."""
        if not isinstance(unit, Encoded):
            return unit
        groups: dict[tuple[Format, bool], list[str]] = {}
        for name, (part, _) in unit.items.items():
            groups.setdefault(part.key, []).append(name)
        decoded: dict[str, Tensor] = {}
        for (fmt, is_wide), names in groups.items():
            items = [unit.items[name] for name in names]
            decoded |= zip(names, self._decode(fmt, items, is_wide=is_wide), strict=True)
        return {name: _cut(part, decoded[name]) for name, (part, _) in unit.items.items()}

    def _decode(
        self, fmt: Format, items: Sequence[tuple[_Slice, Mapping[str, Tensor]]], *, is_wide: bool
    ) -> list[Tensor]:
        """Returns the weights, decoded in one launch."""
        import torch

        from dsv3_tools.model.numerics import wide

        if is_wide:
            return _decode(fmt, items, wide(self.dtype))
        if self._through_bf16:
            return [weight.to(self.dtype) for weight in _decode(fmt, items, torch.bfloat16)]
        return _decode(fmt, items, self.dtype)

    def _slice(self, wanted: Wanted) -> _Slice:
        """Returns what to read for a weight.

        Raises:
            CheckpointError: it is not there.
            FormatError: a part is missing or of another dtype or shape.
        """
        if wanted.name not in self._stored:
            raise CheckpointError(
                f"{self.checkpoint.source}: {wanted.name} "
                f"{self._refused.get(wanted.name, 'is missing')}; the forward pass needs it"
            )
        checkpoint, stored = self._stored[wanted.name]
        _check(checkpoint, stored)
        fmt, shape = stored.format, stored.shape
        if wanted.rows is None or fmt.row_alignment is None:
            return _Slice(checkpoint, stored, wanted, 0, shape, *_places(fmt, shape, 0))
        together = fmt.row_alignment
        first = wanted.rows.start // together * together
        last = min(-(-wanted.rows.stop // together) * together, shape[0])
        stripe = (last - first, *shape[1:])
        return _Slice(checkpoint, stored, wanted, first, stripe, *_places(fmt, stripe, first))


def _find(checkpoint: Checkpoint) -> Stored:
    where = checkpoint.where(CONFIG_NAME)
    return find_weights(checkpoint.specs, read_formats(checkpoint.config_json, where))


def _check(checkpoint: Checkpoint, stored: StoredWeight) -> None:
    expected = stored.format.parts(stored.shape)
    for part, name in stored.parts.items():
        found = checkpoint.specs.get(name)
        if found != expected[part]:
            raise FormatError(
                f"{checkpoint.source}: {name} is {found or 'missing'}, expected {expected[part]} "
                f"for {stored.format.name} weights of shape {list(stored.shape)}"
            )


def _places(
    fmt: Format, shape: tuple[int, ...], first_row: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Returns specs of the parts of a stripe, and the byte at which each begins.

    What follows from the shape alone (`weight_shape`) is whole in every stripe; nobody decodes it.
    """
    specs = fmt.parts(shape)
    if not first_row:
        return specs, dict.fromkeys(specs, 0)
    above = fmt.parts((first_row, *shape[1:]))
    fixed = fmt.fixed(shape)
    return specs, {part: 0 if part in fixed else spec.nbytes for part, spec in above.items()}


def _decode(
    fmt: Format, items: Sequence[tuple[_Slice, Mapping[str, Tensor]]], dtype: torch.dtype
) -> list[Tensor]:
    """Returns the weights in `dtype`; a dense one of that type is itself the weight."""
    import torch

    if isinstance(fmt, Dense):
        return [parts["weight"].to(dtype) for _, parts in items]
    # The formats know BF16 and float32; float64 computes with the float32 weights.
    target = dtype if dtype == torch.bfloat16 else torch_dtype("F32")
    outs = [torch.empty(p.shape, dtype=target, device=next(iter(t.values())).device) for p, t in items]
    fmt.decode_into([parts for _, parts in items], outs)
    return [out.to(dtype) for out in outs]


def _cut(part: _Slice, weight: Tensor) -> Tensor:
    """Returns the wanted rows and columns, without the rest in memory behind them."""
    rows, columns = part.wanted.rows, part.wanted.columns
    if rows is not None:
        weight = weight[rows.start - part.first_row : rows.stop - part.first_row]
    if columns is not None:
        weight = weight[:, columns.start : columns.stop]
    return weight if columns is None else weight.contiguous()
