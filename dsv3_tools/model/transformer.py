"""A checkpoint as a model: embedding, layers one at a time, logits in chunks, MTP.

>>> import torch
>>> from dsv3_tools import Checkpoint
>>> model = Transformer(Checkpoint("miniature/checkpoint"))
>>> hidden = model.embed(torch.tensor([[11, 12, 13]]))
>>> for number, layer in model.layers():
...     hidden, routes = layer.forward(hidden)
>>> [tuple(part.shape) for part in model.logits(hidden)]
[(3, 2048)]

Nothing is kept between layers but the hidden states, which are the caller's. Left out: a KV cache, padding
and attention masks (sequences of a batch have one length), training.

Shape suffixes: B sequences, L tokens of a sequence, T = B x L, D hidden, V vocabulary.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import CheckpointError, UsageError, join_problems
from dsv3_tools.formats import Format
from dsv3_tools.model.cores import reading_threads
from dsv3_tools.model.head import Head
from dsv3_tools.model.layer import Layer
from dsv3_tools.model.mlp import Tap
from dsv3_tools.model.module import find_module
from dsv3_tools.model.mtp import Mtp
from dsv3_tools.model.parallel import ALONE, RankGroup
from dsv3_tools.model.prefetch import Order, Prefetcher, Readers
from dsv3_tools.model.rope import Ropes
from dsv3_tools.model.settings import Settings
from dsv3_tools.model.units import layer_orders, stripe
from dsv3_tools.model.weights import Supply, Unit, Wanted, WeightSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["READ_AHEAD_NBYTES", "Transformer"]

READ_AHEAD_NBYTES = {"cuda": 4 << 30, "cpu": 1 << 30}
"""Bytes of weights that are read ahead, unless told otherwise."""

_STRIPE_ROWS = 8192
_CHUNK_TOKENS = 1024


class Transformer:
    """The forward pass of a checkpoint in any format.

    Args:
        checkpoint: open; must stay so.
        device: "cpu", "cuda:0", ...: where everything is computed.
        dtype: "F32" or "BF16", of weights and hidden states ("F64" measures rounding).
        module: a checkpoint with an MTP module, in place of what `checkpoint` may have itself.
        through_bf16: rounds decoded weights to BF16, whatever is computed in: then a quantized checkpoint and
            its conversion to BF16 are the same model, bit for bit.
        ranks: divides the work with other processes; every one of them must make the same calls, and has
            the same results.
        budget: bytes of weights that are read ahead; None is 1 GiB on a CPU, 4 GiB on a GPU.
        threads: that read; None is one for each core, or for every other one if computing has to share them.

    Attributes:
        settings: every number of the forward pass.
        device: torch's device.
        ranks: those given, or this process alone.

    Raises:
        CheckpointError: the model is not one that the forward pass knows.
        UsageError: no such dtype.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        module: Checkpoint | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "F32",
        through_bf16: bool = False,
        ranks: RankGroup | None = None,
        budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        import torch

        from dsv3_tools.model.numerics import COMPUTE_DTYPES, compute_dtype

        if dtype not in COMPUTE_DTYPES:
            raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(COMPUTE_DTYPES)}")
        self.checkpoint = checkpoint
        self.settings = Settings.from_json(checkpoint.config_json, checkpoint.where(CONFIG_NAME))
        self.device = torch.device(device)
        self.dtype = compute_dtype(dtype)
        self.ranks = ranks or ALONE
        found = None if module is None else find_module(module, self.settings.dims)
        if found is not None:
            dims = replace(self.settings.dims, num_nextn_predict_layers=len(found.layers))
            self.settings = replace(self.settings, dims=dims)
        self._source = WeightSource(
            checkpoint, module=found, device=self.device, dtype=self.dtype, through_bf16=through_bf16
        )
        self._ropes = Ropes(self.settings, self.device)
        self._budget = budget or READ_AHEAD_NBYTES[self.device.type]
        self._threads = threads or reading_threads(self.device.type, self.ranks.processes_here)
        self._kept: Readers | None = None

    @property
    def mtp_layers(self) -> range:
        """Layer numbers of the MTP module: as many as config.json promises and are there."""
        layers = self.settings.dims.mtp_layers
        there = [n for n in layers if f"model.layers.{n}.eh_proj.weight" in self._source]
        return range(layers.start, layers.start + len(there))

    def check(self) -> None:
        """Looks up every weight of this rank, from headers alone: better before the first layer than after.

        Raises:
            CheckpointError: weights are missing, refused or of another shape, all of them in one message.
            FormatError: a weight's parts are not those of its format.
        """
        dims = self.settings.dims
        expected = dense_tensors(dims)
        orders = self._orders(range(dims.num_hidden_layers))
        for index, number in enumerate(self.mtp_layers):
            orders += [*layer_orders(self.settings, number, self.ranks), *self.mtp(index).orders()]
        ends = ("model.embed_tokens.weight", "model.norm.weight", self.head_name)
        orders.append(Order("ends", {name: Wanted(name) for name in ends}))
        wanted = [one for order in orders for one in order.unit.values()]
        problems = [text for one in wanted for text in self._problems(one, expected)]
        if problems:
            raise CheckpointError(join_problems(list(dict.fromkeys(problems))))

    def embed(self, tokens_BL: Tensor, *, on_host: bool = False) -> Tensor:
        """Returns the hidden states `[B, L, D]` before the first layer.

        Args:
            tokens_BL: token ids, int64.
            on_host: in host memory, pinned if there is a GPU; all later hidden states stay there, too.

        Raises:
            UsageError: a token is not in the vocabulary.
        """
        return self.embed_with("model.embed_tokens.weight", tokens_BL, on_host=on_host)

    def layers(self, *, first: int = 0) -> Iterator[tuple[int, Layer]]:
        """Yields the model's own layers, from number `first` on, the next ones being read meanwhile.

        A layer is used before the next one is asked for.
        """
        numbers = range(first, self.settings.dims.num_hidden_layers)
        with self.reading(self._orders(numbers)) as weights:
            for number in numbers:
                yield number, self.layer(number, weights)

    def logits(self, hidden_BLD: Tensor, *, chunk: int = _CHUNK_TOKENS) -> Iterator[Tensor]:
        """Yields the logits of hidden states after the last layer: float32 `[chunk, V]` on the device.

        The final norm is applied here. `hidden_BLD` may have any dimensions before D; tokens come in order.
        """
        return self.head().chunks(hidden_BLD, chunk)

    def head(self) -> Head:
        """Returns final norm and output matrix, in memory until it is dropped."""
        return self.head_with("model.norm.weight", self.head_name)

    def mtp(self, index: int = 0, *, is_repeated: bool = False) -> Mtp:
        """Returns an MTP layer.

        Args:
            index: from 0.
            is_repeated: it works on hidden states of its own, not of the layer before it.

        Raises:
            UsageError: the checkpoint has no such layer.
        """
        if index not in range(len(self.mtp_layers)):
            raise UsageError(
                f"{self.checkpoint.source}: MTP layer {index} is asked for, the checkpoint has "
                f"{len(self.mtp_layers)}"
            )
        return Mtp(self, index, is_repeated=is_repeated)

    @property
    def head_name(self) -> str:
        """Name of the matrix that gives logits."""
        tied = self.settings.dims.tie_word_embeddings and "lm_head.weight" not in self._source
        return "model.embed_tokens.weight" if tied else "lm_head.weight"

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this weight, by its name in an unquantized checkpoint."""
        return name in self._source

    def stored(self, name: str) -> tuple[Checkpoint, Format, Mapping[str, str]]:
        """Returns where a weight is: the checkpoint, the format, and its parts' tensor names."""
        return self._source.where(name)

    def layer(self, number: int, weights: Supply, *, tap: Tap | None = None) -> Layer:
        """Returns a layer that takes its weights from `weights`; `tap` sees the inputs of its linears."""
        return Layer(
            number,
            self.settings,
            weights,
            ranks=self.ranks,
            device=self.device,
            ropes=self._ropes,
            tap=tap,
        )

    @contextmanager
    def reading(self, orders: Sequence[Order]) -> Iterator[Prefetcher]:
        """Reads units ahead in this order."""
        with ExitStack() as stack:
            readers = self._kept or stack.enter_context(Readers(self.device, self._threads))
            yield stack.enter_context(Prefetcher(self._source, orders, budget=self._budget, readers=readers))

    @contextmanager
    def keeping_readers(self) -> Iterator[None]:
        """Has all `reading` inside share threads and pinned memory, which take a second to make."""
        with Readers(self.device, self._threads) as readers:
            self._kept = readers
            try:
                yield
            finally:
                self._kept = None

    def read(self, unit: Unit) -> dict[str, Tensor]:
        """Returns the decoded weights of one unit."""
        with self.reading([Order("unit", unit)]) as weights:
            return weights.take("unit", unit)

    def embed_with(self, name: str, tokens_BL: Tensor, *, on_host: bool = False) -> Tensor:
        """Does `embed` with the matrix of this name, reading only the stripes that have a token."""
        import torch

        num_rows = self.settings.dims.vocab_size
        low, high = (int(bound) for bound in tokens_BL.aminmax())
        if low < 0 or high >= num_rows:
            raise UsageError(f"tokens {low} to {high}: expected 0 to vocab_size - 1, {num_rows - 1}")
        place = torch.device("cpu") if on_host else self.device
        tokens_BL = tokens_BL.to(place, torch.int64)
        hidden_BLD = torch.empty(
            (*tokens_BL.shape, self.settings.dims.hidden_size),
            dtype=self.dtype,
            device=place,
            pin_memory=on_host and self.device.type == "cuda",
        )
        stripes = sorted(set((tokens_BL.flatten() // _STRIPE_ROWS).tolist()))
        for rows, weight in self._stripes(name, stripes):
            inside = (tokens_BL >= rows.start) & (tokens_BL < rows.stop)
            hidden_BLD[inside] = weight.to(place)[tokens_BL[inside] - rows.start]
        return hidden_BLD

    def head_with(self, norm_name: str, matrix_name: str) -> Head:
        """Does `head` with the norm and the matrix of these names."""
        norm = self.read({"norm": Wanted(norm_name, is_wide=True)})["norm"]
        return Head(norm, self._matrix(matrix_name), self.settings.rms_norm_eps)

    def _matrix(self, name: str) -> Tensor:
        """Returns a matrix with a row for each token, read by all threads."""
        import torch

        dims = self.settings.dims
        whole = torch.empty((dims.vocab_size, dims.hidden_size), dtype=self.dtype, device=self.device)
        for rows, weight in self._stripes(name, range(-(-dims.vocab_size // _STRIPE_ROWS))):
            whole[rows.start : rows.stop] = weight
        return whole

    def _stripes(self, name: str, numbers: Sequence[int]) -> Iterator[tuple[range, Tensor]]:
        num_rows = self.settings.dims.vocab_size
        stripes = [range(n * _STRIPE_ROWS, min((n + 1) * _STRIPE_ROWS, num_rows)) for n in numbers]
        orders = [stripe(name, rows) for rows in stripes]
        with self.reading(orders) as weights:
            for rows, order in zip(stripes, orders, strict=True):
                yield rows, weights.take(order.key, order.unit)["weight"]

    def _problems(self, wanted: Wanted, expected: Mapping[str, TensorSpec]) -> Iterator[str]:
        try:
            found = self._source.prepare({"weight": wanted}).slices["weight"].stored.shape
        except CheckpointError as error:
            yield str(error)
            return
        shape = expected[wanted.name].shape if wanted.name in expected else found
        if found != shape:
            yield (
                f"{self.checkpoint.source}: {wanted.name} is {list(found)}, config.json makes it "
                f"{list(shape)}"
            )

    def _orders(self, numbers: Sequence[int]) -> list[Order]:
        return [order for number in numbers for order in layer_orders(self.settings, number, self.ranks)]
