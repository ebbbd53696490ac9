"""Rotary position embedding with YaRN, as published.

Sources: `modeling_deepseek.py` of the release (`DeepseekV3YarnRotaryEmbedding`, `apply_rotary_pos_emb`);
YaRN, arXiv 2309.00071. Frequencies and angles are float32, as there, whatever the hidden states are.

Shape suffixes: L positions, R rope dimensions of a head.
"""
# ruff: noqa: N803 (shape suffixes are capitals)

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import TYPE_CHECKING

from dsv3_tools.model.settings import Settings, Yarn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Rope", "Ropes", "frequencies", "make_rope", "mscale", "softmax_scale"]


@dataclass(frozen=True)
class Rope:
    """Cosine and sine `[L, R / 2]` of every position, and which dimensions are turned together."""

    cos: Tensor
    sin: Tensor
    interleave: bool

    def rotate(self, x_LR: Tensor) -> Tensor:
        """Returns `x_LR` (any dimensions before L) turned; computed wide, rounded once.

        The result has the first half of every pair, then the second: attention doesn't mind the order, as
        queries and keys have the same.
        """
        import torch

        values = x_LR.to(self.cos.dtype)
        if self.interleave:
            first, second = values[..., 0::2], values[..., 1::2]
        else:
            first, second = values.chunk(2, dim=-1)
        turned = torch.cat(
            (first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1
        )
        return turned.to(x_LR.dtype)


class Ropes:
    """The ropes of a model on one device, each computed once."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._known: dict[tuple[int, torch.dtype], Rope] = {}

    def get(self, length: int, dtype: torch.dtype) -> Rope:
        """Returns the rope of positions 0 to `length` - 1 for hidden states of this type."""
        key = length, dtype
        if key not in self._known:
            self._known[key] = make_rope(self._settings, length, device=self._device, dtype=dtype)
        return self._known[key]


def make_rope(settings: Settings, length: int, *, device: torch.device, dtype: torch.dtype) -> Rope:
    """Returns the rope of positions 0 to `length` - 1; `dtype` is that of the hidden states."""
    import torch

    from dsv3_tools.model.numerics import wide

    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, frequencies(settings)).to(wide(dtype))
    yarn = settings.yarn
    amplitude = (
        1.0 if yarn is None else mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    )
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return Rope(cos.to(device), sin.to(device), settings.rope_interleave)


def frequencies(settings: Settings) -> Tensor:
    """Returns the angle that each pair turns by from one position to the next, float32 `[R / 2]`.

    YaRN: pairs that turn more than `beta_fast` times over the original context keep their frequency, those
    that turn less than `beta_slow` times have it divided by `factor`, those between are blended.
    """
    import torch

    size = settings.dims.qk_rope_head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    plain = 1.0 / settings.rope_theta**exponents
    if settings.yarn is None:
        return plain
    yarn = settings.yarn
    low = max(floor(_pair_that_turns(yarn.beta_fast, settings, yarn)), 0)
    high = min(ceil(_pair_that_turns(yarn.beta_slow, settings, yarn)), size - 1)
    span = high - low if high != low else 0.001  # as published, against a division by 0
    stretched = ((torch.arange(size // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / yarn.factor * stretched + plain * (1 - stretched)


def _pair_that_turns(times: float, settings: Settings, yarn: Yarn) -> float:
    """Returns the number of the pair that turns so many times over the original context."""
    wavelength = yarn.original_max_position_embeddings / (times * 2 * pi)
    return settings.dims.qk_rope_head_dim * log(wavelength) / (2 * log(settings.rope_theta))


def mscale(factor: float, weight: float) -> float:
    """Returns YaRN's attention scale for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0


def softmax_scale(settings: Settings) -> float:
    """Returns what attention scores are multiplied by: `mscale_all_dim` counts for queries and for keys."""
    scale: float = settings.dims.qk_head_dim**-0.5
    if settings.yarn is not None and settings.yarn.mscale_all_dim:
        scale *= mscale(settings.yarn.factor, settings.yarn.mscale_all_dim) ** 2
    return scale
