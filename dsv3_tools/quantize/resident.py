"""One layer's weights in memory: decoded, or as the parts of a format, which are decoded for each use."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

from dsv3_tools.formats import Format
from dsv3_tools.model.weights import Unit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Resident", "decode"]


def decode(items: Mapping[str, tuple[Format, Mapping[str, Tensor]]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns weights in `dtype`, rounded to BF16 on the way, as engines have them."""
    import torch

    outs, groups = {}, dict[Format, list[str]]()
    for name, (fmt, parts) in items.items():
        shape = fmt.shape_of(tuple(parts[fmt.weight_part].shape))
        device = parts[fmt.weight_part].device
        outs[name] = torch.empty(shape, dtype=torch.bfloat16, device=device)
        groups.setdefault(fmt, []).append(name)
    for fmt, names in groups.items():
        fmt.decode_into([items[name][1] for name in names], [outs[name] for name in names])
    return {name: weight.to(dtype) for name, weight in outs.items()}


class Resident:
    """The weights of a layer, for `Layer` to take as often as it likes.

    Args:
        dtype: of weights that are decoded for use.

    Attributes:
        decoded: weights by unit and name, in the type in which they are computed with.
        encoded: those that are decoded when they are taken.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.decoded: dict[Hashable, dict[str, Tensor]] = {}
        self.encoded: dict[Hashable, dict[str, tuple[Format, Mapping[str, Tensor]]]] = {}

    def take(self, key: Hashable, unit: Unit) -> dict[str, Tensor]:
        """Returns the unit's weights."""
        del unit
        weights = dict(self.decoded.get(key, {}))
        if encoded := self.encoded.get(key):
            weights |= decode(encoded, self._dtype)
        return weights
