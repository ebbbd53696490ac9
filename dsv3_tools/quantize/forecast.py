"""What a calibrated run will take, before it begins: from the shapes, and from a few seconds of the device.

Multiplications are counted layer by layer and divided by the rate that the device shows; a Hessian's factor
and the column loop are timed on a matrix of up to a few thousand columns, and scaled. What disks do is not in
it: `least_disk_rate` is what they have to give so that nothing waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.model.transformer import READ_AHEAD_NBYTES
from dsv3_tools.quantize.experts import DOWN_SAMPLE
from dsv3_tools.quantize.layer_work import TOKENS_OF_EXPERTS

if TYPE_CHECKING:
    import torch

__all__ = ["Forecast", "Matrices", "UnitSpeeds", "forecast", "measure"]

_REPEATS = 3
_PROBE_SIZE = {"cuda": 4096, "cpu": 768}
_LAYER_SECONDS = 0.3


@dataclass(frozen=True)
class UnitSpeeds:
    """What a device does in a second.

    Attributes:
        products: multiplications (with an addition each) of a product of matrices in the forward pass's type.
        factor: of a Cholesky decomposition in float32, K^3 / 3 of them for K inputs.
        columns: elements of a weight that the column loop goes through, for each input: N x K x K.
    """

    products: float
    factor: float
    columns: float


class Matrices(NamedTuple):
    """Weights of one shape: how many, and whether they are routed experts'; gate and up are one."""

    rows: int
    columns: int
    times: int
    is_expert: bool


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        seconds: of computing, on all ranks together.
        factor_seconds: of them, factors of Hessians.
        column_seconds: of them, the column loop.
        device_nbytes: of memory on each device, at most.
        states_nbytes: of hidden states, wherever they are.
        states_place: "device", "host" or "file".
        least_disk_rate: bytes in a second, read and written, for the disks not to be waited for.
        world_size: processes.
    """

    seconds: float
    factor_seconds: float
    column_seconds: float
    device_nbytes: int
    states_nbytes: int
    states_place: str
    least_disk_rate: float
    world_size: int


def measure(device: torch.device, dtype: torch.dtype, columns: int) -> UnitSpeeds:
    """Returns what a device does with weights of so many columns, after a few seconds of trying."""
    import torch

    from dsv3_tools.kernels.reference_gptq import Grid
    from dsv3_tools.quantize.matrix import BLOCK, factorize, quantize_matrix

    size = -(-min(columns, _PROBE_SIZE["cuda" if device.type == "cuda" else "cpu"]) // BLOCK) * BLOCK
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(size, size, generator=generator, device=device)
    hessian = x.t() @ x / size + torch.eye(size, device=device)
    factor = factorize(hessian, 0.01)
    assert factor is not None
    half = x.to(dtype)
    grid = Grid(15, 7.5, BLOCK, True, torch.bfloat16)
    rows = size // 2
    seconds = [
        _seconds(call, device)
        for call in (
            lambda: half @ half,
            lambda: factorize(hessian, 0.01),
            lambda: quantize_matrix(x[:rows], hessian, grid, factor),
        )
    ]
    return UnitSpeeds(size**3 / seconds[0], size**3 / 3 / seconds[1], rows * size * size / seconds[2])


def forecast(
    dims: ModelConfig,
    *,
    weights: list[Matrices],
    num_layers: int,
    tokens: int,
    states_place: str,
    value_nbytes: int,
    disk_nbytes: int,
    speeds: UnitSpeeds,
    is_gptq: bool,
    world_size: int,
    device_type: str,
) -> Forecast:
    """Returns what a run will take.

    Args:
        dims: of the model.
        weights: all that is quantized.
        num_layers: that hidden states go through.
        tokens: of all sequences.
        states_place: where hidden states are.
        value_nbytes: of one of their values.
        disk_nbytes: read and written.
        speeds: of the device.
        is_gptq: whether errors are made up for.
        world_size: ranks.
        device_type: "cpu" or "cuda".
    """
    products = num_layers * tokens * _products_of_token(dims)
    routed = dims.n_routed_experts or 1
    per_expert = tokens * dims.num_experts_per_tok / routed
    factor_work = column_work = 0.0
    for rows, columns, count, is_expert in weights:
        seen = (
            per_expert + (min(tokens, DOWN_SAMPLE) if rows == dims.hidden_size else 0)
            if is_expert
            else 2 * tokens
        )
        products += count * seen * columns * (columns + 2 * rows)
        factor_work += count * columns**3 / 3 if is_gptq else 0.0
        column_work += count * rows * columns * columns if is_gptq else 0.0
    factor_seconds, column_seconds = factor_work / speeds.factor, column_work / speeds.columns
    seconds = (products / speeds.products + factor_seconds + column_seconds) / world_size
    seconds += num_layers * _LAYER_SECONDS
    states = tokens * dims.hidden_size * value_nbytes
    return Forecast(
        seconds=seconds,
        factor_seconds=factor_seconds / world_size,
        column_seconds=column_seconds / world_size,
        device_nbytes=_device_nbytes(dims, weights, tokens, states, states_place, device_type),
        states_nbytes=states,
        states_place=states_place,
        least_disk_rate=disk_nbytes / max(seconds, 1e-9),
        world_size=world_size,
    )


def _products_of_token(dims: ModelConfig) -> float:
    """Returns the multiplications of a token in a layer: attention, and its experts once more at the end."""
    hidden, heads = dims.hidden_size, dims.num_attention_heads
    query = dims.q_lora_rank or 0
    attention = hidden * (query + dims.kv_lora_rank + dims.qk_rope_head_dim)
    attention += (query or hidden) * heads * dims.qk_head_dim + heads * dims.v_head_dim * hidden
    attention += dims.kv_lora_rank * heads * (dims.qk_nope_head_dim + dims.v_head_dim)
    experts = (dims.num_experts_per_tok + dims.n_shared_experts) * 3 * hidden * dims.moe_intermediate_size
    return float(attention + experts)


def _device_nbytes(
    dims: ModelConfig,
    weights: list[Matrices],
    tokens: int,
    states: int,
    states_place: str,
    device_type: str,
) -> int:
    """Returns a bound on a device's memory: states, one weight's Hessians and copies, a quantized layer."""
    largest = max(one.columns for one in weights)
    hessians = 6 * 4 * largest * largest
    copies = 6 * 4 * max(one.rows * one.columns for one in weights)
    layer = 3 * dims.n_routed_experts * dims.moe_intermediate_size * dims.hidden_size
    together = 12 * min(tokens, TOKENS_OF_EXPERTS) * dims.hidden_size
    own = states if states_place == "device" or device_type == "cpu" else 0
    return own + hessians + copies + layer + together + READ_AHEAD_NBYTES[device_type]


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    import torch

    found = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
