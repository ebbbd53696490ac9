"""Which tensors of two checkpoints belong together, and what is left over on either side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.planning import read_stored
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import Dense
from dsv3_tools.formats.stored import Stored, StoredWeight

__all__ = ["Pair", "Pairing", "pair_up", "part_problems"]

_OTHER_KEYS = {"quantization_config", "num_nextn_predict_layers", "torch_dtype", "dtype"}
"""Keys of config.json that conversions change, or that say nothing about the model."""

_ROUTER_BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True)
class Pair:
    """One parameter of the model, as either checkpoint stores it."""

    reference: StoredWeight
    candidate: StoredWeight

    @property
    def name(self) -> str:
        """Its name in an unquantized checkpoint."""
        return self.reference.full_name


@dataclass(frozen=True)
class Pairing:
    """Every tensor of both checkpoints accounted for.

    `pairs` can be compared; `problems` must not be; `notes` is what differs and may.
    """

    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def pair_up(reference: Checkpoint, candidate: Checkpoint) -> Pairing:
    """Returns the parameters that both checkpoints have, and whatever else they have.

    Raises:
        FormatError: a quantization that is not known here.
    """
    problems: list[str] = []
    sides = []
    for checkpoint in (reference, candidate):
        stored = read_stored(checkpoint)
        problems += _own_problems(checkpoint, stored)
        sides.append({weight.full_name: weight for weight in stored.weights})
    ours, theirs = sides
    missing, notes = _missing(reference, candidate, ours, theirs)
    if missing:
        problems.append(f"{len(missing)} parameters are missing in the candidate: {list_names(missing)}")
    extra = sorted(name for name in theirs.keys() - ours.keys() if not name.endswith(".inv_freq"))
    if extra:
        problems.append(f"{len(extra)} parameters are in the candidate alone: {list_names(extra)}")
    notes += _config_notes(reference, candidate)
    pairs = [Pair(ours[name], theirs[name]) for name in ours if name in theirs]
    comparable = []
    for pair in pairs:
        found = [*_pair_problems(pair, reference, candidate)]
        problems += found
        if not found:
            comparable.append(pair)
    notes += _dtype_notes(comparable)
    return Pairing(tuple(comparable), tuple(problems), tuple(notes))


def part_problems(checkpoint: Checkpoint, weight: StoredWeight) -> Iterator[str]:
    """Yields what is wrong with the tensors that store a weight, by their specs."""
    try:
        expected = weight.format.parts(weight.shape)
    except FormatError as error:
        yield f"{weight.code_name}: {error}"
        return
    for part, name in weight.parts.items():
        found = checkpoint.specs.get(name)
        if found is None:
            yield f"{weight.code_name} lacks its {part}"
        elif found != expected[part] and not isinstance(weight.format, Dense):
            yield f"{name} is {found}, expected {expected[part]} for a weight {list(weight.shape)}"


def _own_problems(checkpoint: Checkpoint, stored: Stored) -> Iterator[str]:
    """Yields the tensors of one checkpoint that store nothing."""
    yield from (f"{checkpoint.source}: {name} {reason}" for name, reason in stored.refused.items())
    counts = Counter(weight.full_name for weight in stored.weights)
    for name, number in counts.items():
        if number > 1:
            yield f"{checkpoint.source}: {name} is stored {number} times, in different formats"


def _missing(
    reference: Checkpoint,
    candidate: Checkpoint,
    ours: Mapping[str, StoredWeight],
    theirs: Mapping[str, StoredWeight],
) -> tuple[list[str], list[str]]:
    """Returns the parameters that the candidate lacks, and a note if it says that it lacks the MTP module."""
    missing = sorted(name for name in ours.keys() - theirs.keys() if not name.endswith(".inv_freq"))
    layers = reference.config.mtp_layers
    has_mtp = any(weight.name.layer in layers for weight in theirs.values())
    if not layers or has_mtp or candidate.config.num_nextn_predict_layers:
        return missing, []
    dropped = [name for name in missing if ours[name].name.layer in layers]
    if not dropped:
        return missing, []
    note = (
        f"the candidate has no MTP module: {len(dropped)} parameters of layer "
        f"{', '.join(map(str, layers))} are left out, as its config.json says (num_nextn_predict_layers 0)"
    )
    return sorted(set(missing) - set(dropped)), [note]


def _pair_problems(pair: Pair, reference: Checkpoint, candidate: Checkpoint) -> Iterator[str]:
    ours, theirs = pair.reference, pair.candidate
    if ours.shape != theirs.shape:
        yield f"{pair.name}: has the shape {list(theirs.shape)}, expected {list(ours.shape)}"
        return
    for checkpoint, weight in ((reference, ours), (candidate, theirs)):
        yield from (f"{checkpoint.source}: {problem}" for problem in part_problems(checkpoint, weight))
    if ours.name.parameter == _ROUTER_BIAS and _is_narrower(pair):
        yield (
            f"{pair.name}: is {theirs.format.code_dtype}, expected {ours.format.code_dtype}: no format "
            "changes it, and rounding it changes the routing"
        )


def _is_narrower(pair: Pair) -> bool:
    ours, theirs = pair.reference.format, pair.candidate.format
    return DTYPES[theirs.code_dtype].bits < DTYPES[ours.code_dtype].bits


def _dtype_notes(pairs: list[Pair]) -> list[str]:
    """Returns a line for each other element type of unquantized tensors."""
    changed: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        ours, theirs = pair.reference.format, pair.candidate.format
        if isinstance(ours, Dense) and isinstance(theirs, Dense) and ours != theirs:
            changed.setdefault((ours.dtype, theirs.dtype), []).append(pair.name)
    return [
        f"{len(names)} unquantized tensors are {after} instead of {before}: {list_names(names)}"
        for (before, after), names in changed.items()
    ]


def _config_notes(reference: Checkpoint, candidate: Checkpoint) -> list[str]:
    """Returns a line if the models' configurations differ in what no conversion changes."""
    ours, theirs = reference.config_json, candidate.config_json
    keys = sorted(key for key in {*ours, *theirs} - _OTHER_KEYS if ours.get(key) != theirs.get(key))
    return [f"config.json differs, too, which changes the model: {list_names(keys)}"] if keys else []
