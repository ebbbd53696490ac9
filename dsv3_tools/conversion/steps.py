"""One step of a plan: a weight on its way from one format to another, or a tensor that is copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.share import Share
from dsv3_tools.formats import Format
from dsv3_tools.formats.fp8_block import LIKE_PART, SCALE_PART

__all__ = ["SOURCE", "Step", "TensorRef"]

SOURCE = "source"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of one of the run's checkpoints; `origin` names the checkpoint ("source", "like", "mtp")."""

    name: str
    origin: str = SOURCE


@dataclass(frozen=True, slots=True)
class Step:
    """One weight on its way from `source` to `target` format, or one tensor copied as it is.

    `inputs` and `outputs` map part names to tensors. Formats with the same bytes (None for a tensor that
    is not a weight in a format) make a byte copy, which never becomes a tensor. `share` is for a
    tensor that is copied, in part, to each of several ranks: `shape` is then that of the part.
    `parameters` is for one part of a weight that is copied alone: how many of the model's parameters it
    stands for. `is_repetition` is for a tensor that another step copies as well, under another name.
    """

    shape: tuple[int, ...]
    inputs: Mapping[str, TensorRef]
    outputs: Mapping[str, str]
    source: Format | None
    target: Format | None
    dtype: str
    share: Share | None = None
    parameters: int | None = None
    is_repetition: bool = False

    @classmethod
    def copy(cls, name: str, spec: TensorSpec) -> Step:
        """Returns the step that copies one tensor's bytes under the same name."""
        return cls(spec.shape, {"weight": TensorRef(name)}, {"weight": name}, None, None, spec.dtype)

    @property
    def is_copy(self) -> bool:
        """Whether bytes are copied without decoding."""
        if self.source is None or self.target is None:
            return True
        return self.source.same_bytes(self.target)

    @property
    def weight(self) -> TensorRef:
        """The tensor that stands for the weight: its elements or codes."""
        return self.inputs["weight" if self.source is None else self.source.weight_part]

    @property
    def copies_scales(self) -> bool:
        """Whether this copies the scales of an FP8 weight whose codes are for another step.

        What is copied part by part, codes or not, is copied unread.
        """
        unread = self.parameters is not None
        return self.source is None and not unread and self.weight.name.endswith(f".{SCALE_PART}")

    @property
    def num_parameters(self) -> int:
        """Elements of the weight, or of the part; none for scales, and for what an earlier rank has."""
        if self.parameters is not None:
            return self.parameters
        repeated = self.share is not None and self.share.is_repetition
        return 0 if repeated or self.copies_scales else prod(self.shape)

    @property
    def fixed_inputs(self) -> dict[str, bytes]:
        """Returns what inputs must hold that a recoding step does not read."""
        return {} if self.source is None or self.is_copy else self.source.fixed(self.shape)

    @property
    def fixed_outputs(self) -> dict[str, bytes]:
        """Returns the content of outputs that follow from the weight's shape alone."""
        return {} if self.target is None or self.is_copy else self.target.fixed(self.shape)

    def input_specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns the specs of the inputs for a weight, or a stripe of it, of `shape`."""
        if self.source is None or self.target is None:
            return {"weight": TensorSpec(self.dtype, shape)}
        specs = self.source.parts(shape)
        if LIKE_PART in self.inputs:
            specs[LIKE_PART] = self.target.parts(shape)[SCALE_PART]
        return specs

    def output_specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns the specs of the outputs for a weight, or a stripe of it, of `shape`."""
        if self.target is None:
            return {"weight": TensorSpec(self.dtype, shape)}
        return self.target.parts(shape)

    def named_outputs(self) -> Iterator[tuple[str, TensorSpec]]:
        """Yields the name and spec of every tensor that this step writes."""
        for part, spec in self.output_specs(self.shape).items():
            yield self.outputs[part], spec

    def by_part(self) -> Iterator[Step]:
        """Yields a copy as one step for each tensor; unlike a weight's, they need not share a shard."""
        codes = "weight" if self.source is None else self.source.weight_part
        for part, spec in self.input_specs(self.shape).items():
            yield Step(
                spec.shape,
                {"weight": self.inputs[part]},
                {"weight": self.outputs[part]},
                None,
                None,
                spec.dtype,
                parameters=self.num_parameters if part == codes else 0,
                is_repetition=self.is_repetition,
            )
