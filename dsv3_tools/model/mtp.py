"""The MTP module: one more layer that predicts the token after the next.

Sources: the released layer 61; DeepSeek-V3 report, 2.2; the order (embedding first, hidden state second) and
what is fed in (hidden states after the norm before the head) from vLLM's and SGLang's DeepSeek MTP models.

Shape suffixes: B sequences, L tokens of a sequence, D hidden, V vocabulary.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from dsv3_tools.model.head import Head
from dsv3_tools.model.layer import Layer, like, sequence_chunks
from dsv3_tools.model.moe import Routes
from dsv3_tools.model.prefetch import Order
from dsv3_tools.model.units import layer_orders, mtp_unit
from dsv3_tools.model.weights import Wanted

if TYPE_CHECKING:
    from torch import Tensor

    from dsv3_tools.model.transformer import Transformer

__all__ = ["Join", "Mtp"]


class Mtp:
    """One MTP layer of a model.

    Attributes:
        number: its layer number.
    """

    def __init__(self, model: Transformer, index: int, *, is_repeated: bool = False) -> None:
        self._model = model
        self.number = model.mtp_layers[index]
        self._prefix = f"model.layers.{self.number}."
        before = f"model.layers.{self.number if is_repeated else self.number - 1}.shared_head.norm.weight"
        self._input_norm = before if index or is_repeated else "model.norm.weight"

    def forward(
        self, hidden_BLD: Tensor, next_BL: Tensor, *, routes: Routes | None = None
    ) -> tuple[Tensor, Routes | None]:
        """Returns the layer's hidden states, and the routes that its tokens took.

        Position t keeps its place for RoPE and predicts the token after `next_BL[:, t]`.

        Args:
            hidden_BLD: of the main model after its last layer (of the MTP layer before, for a second one),
                not normalised: the norm before that one's head is applied here.
            next_BL: the token that follows each position.
            routes: takes these in place of the router's own.
        """
        with self.opened() as (join, layer):
            return layer.forward(*join([hidden_BLD], next_BL), routes=routes)

    @contextmanager
    def opened(self) -> Iterator[tuple[Join, Layer]]:
        """Gives what makes the layer's input, and the layer itself, for several batches of hidden states."""
        model = self._model
        (joining,) = self.orders()
        unit = joining.unit
        orders = [joining, *layer_orders(model.settings, self.number, model.ranks)]
        with model.reading(orders) as weights:
            yield self.join(weights.take("join", unit)), model.layer(self.number, weights)

    def join(self, weights: dict[str, Tensor]) -> Join:
        """Returns what makes the layer's input, of the weights of the unit in `orders`."""
        own = f"{self._prefix}embed_tokens.weight"
        embedding = own if self._model.has(own) else "model.embed_tokens.weight"
        return Join(self._model, embedding, weights)

    def orders(self) -> list[Order]:
        """Returns what is read before the layer proper."""
        return [Order("join", {**mtp_unit(self.number), "norm": Wanted(self._input_norm, is_wide=True)})]

    def logits(self, hidden_BLD: Tensor, *, chunk: int = 1024) -> Iterator[Tensor]:
        """Yields logits as `Transformer.logits` does, through the shared head."""
        return self.head().chunks(hidden_BLD, chunk)

    def head(self) -> Head:
        """Returns the shared head: its norm is the layer's own.

        The matrix is the layer's copy, or the main model's if the checkpoint has none.
        """
        own = f"{self._prefix}shared_head.head.weight"
        matrix = own if self._model.has(own) else self._model.head_name
        return self._model.head_with(f"{self._prefix}shared_head.norm.weight", matrix)


class Join(NamedTuple):
    """What an MTP layer has before its layer proper: norms, and the matrix that joins the two."""

    model: Transformer
    embedding: str
    weights: dict[str, Tensor]

    def __call__(self, hiddens: Sequence[Tensor], next_BL: Tensor) -> list[Tensor]:
        """Returns the layer's input for each of several batches with the same tokens."""
        on_host = hiddens[0].device != self.model.device
        embedded_BLD = self.model.embed_with(self.embedding, next_BL, on_host=on_host)
        return [self._join(hidden_BLD, embedded_BLD.to(hidden_BLD.dtype)) for hidden_BLD in hiddens]

    def _join(self, hidden_BLD: Tensor, embedded_BLD: Tensor) -> Tensor:
        import torch

        from dsv3_tools.model.numerics import linear, rms_norm

        weights, device, eps = self.weights, self.model.device, self.model.settings.rms_norm_eps
        matrix = weights["eh_proj"].to(hidden_BLD.dtype)
        joined_BLD = like(hidden_BLD)
        for rows in sequence_chunks(hidden_BLD):
            hidden = rms_norm(hidden_BLD[rows].to(device), weights["norm"], eps)
            pair = (
                rms_norm(embedded_BLD[rows].to(device), weights["enorm"], eps),
                rms_norm(hidden, weights["hnorm"], eps),
            )
            joined_BLD[rows] = linear(torch.cat(pair, dim=-1), matrix)
        return joined_BLD
