"""The plan of a run: the whole destination directory, before a byte of it is written.

A plan is built from specs alone, of steps that `check_steps` has found to add up.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.header import Header, encode_header
from dsv3_tools.checkpoint.index import INDEX_NAME, encode_index
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.share import Share
from dsv3_tools.formats import Format
from dsv3_tools.formats.fp8_block import LIKE_PART, SCALE_PART
from dsv3_tools.formats.integer import IntegerFormat
from dsv3_tools.formats.recode import moves_codes

__all__ = [
    "PLAN_VERSION",
    "Change",
    "Plan",
    "ShardPlan",
    "Share",
    "SourceFile",
    "Step",
    "TensorRef",
]

PLAN_VERSION = 1
"""Raised whenever the same plan would give other bytes: leftovers of another version are not resumed."""

SOURCE = "source"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of one of the run's checkpoints; `origin` names the checkpoint ("source", "like")."""

    name: str
    origin: str = SOURCE


@dataclass(frozen=True, slots=True)
class Step:
    """One weight on its way from `source` to `target` format, or one tensor copied as it is.

    `inputs` and `outputs` map part names to tensors. Formats with the same bytes (None for a tensor that
    is not a weight in a format) make a byte copy, which never becomes a tensor. `share` is for a
    tensor that is copied, in part, to each of several ranks: `shape` is then that of the part.
    """

    shape: tuple[int, ...]
    inputs: Mapping[str, TensorRef]
    outputs: Mapping[str, str]
    source: Format | None
    target: Format | None
    dtype: str
    share: Share | None = None

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
        """Whether this copies the scales of an FP8 weight whose codes are for another step."""
        return self.source is None and self.weight.name.endswith(f".{SCALE_PART}")

    @property
    def num_parameters(self) -> int:
        """Elements of the weight, or of the part; none for scales, and for what an earlier rank has."""
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


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its name and the steps that fill it, in the order of their first byte."""

    name: str
    steps: tuple[Step, ...]
    nbytes: int
    header_sha256: str

    @classmethod
    def build(cls, name: str, steps: Sequence[Step]) -> ShardPlan:
        """Returns the shard with `steps` put into file order."""
        encoded, header = encode_header(dict(pair for step in steps for pair in step.named_outputs()))
        ordered = sorted(steps, key=lambda step: _first_byte(step, header))
        return cls(name, tuple(ordered), header.file_nbytes, hashlib.sha256(encoded).hexdigest())

    def header(self) -> tuple[bytes, Header]:
        """Returns the file's header, encoded and as offsets; not kept, it is megabytes for 163 shards."""
        return encode_header(self.specs())

    def specs(self) -> dict[str, TensorSpec]:
        """Returns every tensor of the file."""
        return dict(pair for step in self.steps for pair in step.named_outputs())


def _what_happens(source: Format, target: Format) -> str:
    """Returns what becomes of codes that were integers already: moved, or quantized once more."""
    if (
        source.same_bytes(target)
        or not isinstance(source, IntegerFormat)
        or not isinstance(target, IntegerFormat)
    ):
        return ""
    return ", codes moved" if moves_codes(source, target) else ", quantized again"


def _first_byte(step: Step, header: Header) -> int:
    """Returns where the first byte goes that must be calculated or read."""
    fixed = step.fixed_outputs
    return min(header.offsets[name] for part, name in step.outputs.items() if part not in fixed)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """What a source file was when the plan was made.

    `ctime_ns` is compared when a run is resumed but is no part of the digest or the manifest: copying
    a finished checkpoint elsewhere must not make it another one.
    """

    origin: str
    name: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    sha256: str
    """Of a shard's header, or of all of a small file; a small file's times are 0, for they do not matter."""


@dataclass(frozen=True, slots=True)
class Change:
    """A line of the plan's summary: so many tensors or weights that go from one form to another."""

    before: str
    after: str
    count: int
    nbytes_before: int
    nbytes_after: int


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do.

    Attributes:
        operation: the command, such as "fp8-to-bf16".
        options: whatever changes the bytes written, as JSON values.
        shards: the output files.
        dropped: source tensors that no step reads, with the reason.
        config: the new `config.json`.
        side_files: files copied unchanged.
        left_behind: names in the source directory that are not copied.
        source_files: what the run reads.
        config_name: the name of `config`, another one in a layout that is not Hugging Face's.
        index_name: the name of the index; None where the same names are in several shards.
        notes: what whoever uses the result must know.
    """

    operation: str
    options: Mapping[str, Any]
    shards: tuple[ShardPlan, ...]
    dropped: Mapping[str, str]
    config: bytes
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    source_files: tuple[SourceFile, ...]
    nbytes_in: int
    config_name: str = CONFIG_NAME
    index_name: str | None = INDEX_NAME
    notes: tuple[str, ...] = ()

    @property
    def commit_point(self) -> str:
        """The file whose rename makes the shards a result: the index, or the manifest if there is none."""
        return self.index_name or MANIFEST_NAME

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that decides the output's bytes; equal digests, equal outputs."""
        sources = [{k: v for k, v in asdict(file).items() if k != "ctime_ns"} for file in self.source_files]
        document = {
            "plan_version": PLAN_VERSION,
            "operation": self.operation,
            "options": self.options,
            "sources": sources,
            "shards": [[shard.name, shard.nbytes, shard.header_sha256] for shard in self.shards],
            "config": hashlib.sha256(self.config).hexdigest(),
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    @cached_property
    def payload_nbytes(self) -> int:
        """Bytes of all output tensors, without headers: the index's `total_size`."""
        return sum(spec.nbytes for shard in self.shards for spec in shard.specs().values())

    @property
    def nbytes_out(self) -> int:
        """Bytes of all output shards, with headers."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def num_tensors_out(self) -> int:
        """Number of tensors in the output."""
        return sum(len(step.outputs) for shard in self.shards for step in shard.steps)

    @property
    def total_parameters(self) -> int:
        """Number of weights and other parameters, scales and what several ranks have alike not counted."""
        return sum(step.num_parameters for shard in self.shards for step in shard.steps)

    def made_files(self) -> dict[str, bytes]:
        """Returns the small files that the run makes, in the order of writing; the manifest comes after."""
        return {self.config_name: self.config} | ({self.index_name: self.index()} if self.index_name else {})

    def index(self) -> bytes:
        """Returns the index file of the output."""
        weight_map = {name: shard.name for shard in self.shards for name in shard.specs()}
        return encode_index(
            weight_map, total_size=self.payload_nbytes, total_parameters=self.total_parameters
        )

    def changes(self) -> list[Change]:
        """Returns what becomes what, by form, the largest first."""
        counts: Counter[tuple[str, str]] = Counter()
        before: Counter[tuple[str, str]] = Counter()
        after: Counter[tuple[str, str]] = Counter()
        for step in (step for shard in self.shards for step in shard.steps):
            key = (step.dtype, "copied")
            if step.source and step.target:
                key = (step.source.name, step.target.name + _what_happens(step.source, step.target))
            counts[key] += 1
            own = {part: spec for part, spec in step.input_specs(step.shape).items() if part != LIKE_PART}
            before[key] += sum(spec.nbytes for spec in own.values())
            after[key] += sum(spec.nbytes for spec in step.output_specs(step.shape).values())
        ordered = sorted(counts, key=lambda key: (-before[key], key))
        return [Change(*key, counts[key], before[key], after[key]) for key in ordered]
