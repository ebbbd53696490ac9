"""The plan of a run: the whole destination directory, before a byte of it is written.

A plan is built from specs alone, of steps that `check_steps` has found to add up.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.header import Header, encode_header
from dsv3_tools.checkpoint.index import INDEX_NAME, encode_index
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME
from dsv3_tools.checkpoint.source import HubRepo
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.share import Share
from dsv3_tools.conversion.steps import SOURCE, Step, TensorRef
from dsv3_tools.formats import Dense, Format
from dsv3_tools.formats.fp8_block import LIKE_PART
from dsv3_tools.formats.integer import IntegerFormat
from dsv3_tools.formats.recode import moves_codes

__all__ = [
    "PLAN_VERSION",
    "SOURCE",
    "Change",
    "Plan",
    "ShardPlan",
    "Share",
    "SourceFile",
    "Step",
    "TensorRef",
    "what_becomes",
]

PLAN_VERSION = 1
"""Raised whenever the same plan would give other bytes: leftovers of another version are not resumed."""


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


def what_becomes(step: Step) -> tuple[str, str]:
    """Returns the form that a step finds, and the one that it leaves or "copied"."""
    if step.source and step.target and step.source != step.target:
        return step.source.name, step.target.name + _what_happens(step.source, step.target)
    if step.source and not isinstance(step.source, Dense):
        return step.source.name, "copied"
    return step.dtype, "copied"


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
        identical: pairs of tensors that must hold the same bytes, checked before anything is written.
        index_metadata: the index's "metadata", `total_size` apart; None for the usual one.
        restoring: what the manifest says for the sake of merging: shards as the source had them.
        repositories: the sources that are on the Hub, at their commits, by origin.
        source_card: what the source's model card says that the result's card takes over.
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
    identical: tuple[tuple[TensorRef, TensorRef], ...] = ()
    index_metadata: Mapping[str, Any] | None = None
    restoring: Mapping[str, Any] = field(default_factory=dict)
    repositories: Mapping[str, HubRepo] = field(default_factory=dict)
    source_card: Mapping[str, Any] = field(default_factory=dict)

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
        if self.restoring or self.index_metadata is not None:
            document |= {"restoring": self.restoring, "index_metadata": self.index_metadata}
        if self.repositories:
            document["repositories"] = {origin: [r.name, r.commit] for origin, r in self.repositories.items()}
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
    def num_tensors_in(self) -> int:
        """Number of tensors in what is converted or joined: read, or left out."""
        steps = (step for shard in self.shards for step in shard.steps)
        refs = {ref for step in steps for part, ref in step.inputs.items() if part != LIKE_PART}
        return len(refs | {TensorRef(name) for name in self.dropped})

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
            weight_map,
            total_size=self.payload_nbytes,
            total_parameters=self.total_parameters,
            metadata=self.index_metadata,
        )

    def changes(self) -> list[Change]:
        """Returns what becomes what, by form, the largest first."""
        counts: Counter[tuple[str, str]] = Counter()
        before: Counter[tuple[str, str]] = Counter()
        after: Counter[tuple[str, str]] = Counter()
        for step in (step for shard in self.shards for step in shard.steps):
            key = what_becomes(step)
            counts[key] += 1
            own = {part: spec for part, spec in step.input_specs(step.shape).items() if part != LIKE_PART}
            before[key] += sum(spec.nbytes for spec in own.values())
            after[key] += sum(spec.nbytes for spec in step.output_specs(step.shape).values())
        ordered = sorted(counts, key=lambda key: (-before[key], key))
        return [Change(*key, counts[key], before[key], after[key]) for key in ordered]
