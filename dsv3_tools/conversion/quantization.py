"""The planner of `dsv3 quantize`: integers straight from FP8 or BF16, the rest in BF16 or FP8."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsv3_tools.checkpoint.config import with_quantization
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.ignore import find_unquantized, names, patterns, substrings
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.planning import (
    check_plan,
    finish_plan,
    read_stored,
    recode_step,
    require_work,
)
from dsv3_tools.conversion.recipes import FP8_REST, MODULES, Selection, select
from dsv3_tools.errors import UsageError
from dsv3_tools.formats import (
    INT4,
    INT4AWQ,
    INT4GPTQ,
    Dense,
    Format,
    FP8Block,
    INT4Packed,
    INT8Block,
    INT8Channel,
)
from dsv3_tools.formats import compressed_tensors as ct
from dsv3_tools.formats.int4 import GROUP_SIZES
from dsv3_tools.formats.stored import Stored, StoredWeight

__all__ = ["INT4Options", "INT8Options", "plan_int4", "plan_int8"]

_FP8 = FP8Block(scale_name=ct.SCALE_NAME)

_LAYOUTS = {"compressed-tensors": INT4Packed, "gptq": INT4GPTQ, "awq": INT4AWQ}
_SCHEMES = {"channel": INT8Channel, "block": INT8Block}


@dataclass(frozen=True)
class _Selecting:
    """What is quantized, for every integer format.

    Attributes:
        include: patterns of module names to quantize beside those of the recipe.
        exclude: patterns of module names to leave out.
        mtp: "quantize" treats the MTP module like the rest of the model, "keep" quantizes nothing in
            it, "drop" leaves it out.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mtp: str = "quantize"

    def __post_init__(self) -> None:
        _check_choice("mtp", self.mtp, ("quantize", "keep", "drop"))


@dataclass(frozen=True)
class INT8Options(_Selecting):
    """Options of `dsv3 quantize int8`.

    Attributes:
        scheme: "channel", a scale for each row, as compressed-tensors stores it; or "block", a scale for
            each 128 x 128 block, as SGLang reads it.
    """

    scheme: str = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("scheme", self.scheme, _SCHEMES)

    @property
    def format(self) -> Format:
        """The format of quantized weights."""
        fmt: Format = _SCHEMES[self.scheme]()
        return fmt


@dataclass(frozen=True)
class INT4Options(_Selecting):
    """Options of `dsv3 quantize int4`.

    Attributes:
        layout: "compressed-tensors", "gptq" or "awq".
        group_size: neighbours in a row that share a scale.
        symmetric: no zero points.
        scale_search: "mse" or "absmax".
        activations: "fp8" has engines quantize the inputs of these weights; None leaves them alone.
        rest: "bf16" or "fp8": what other linears are stored in.
    """

    layout: str = "compressed-tensors"
    group_size: int = 128
    symmetric: bool = True
    scale_search: str = "mse"
    activations: str | None = None
    rest: str = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("layout", self.layout, _LAYOUTS)
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        _check_choice("scale_search", self.scale_search, ("mse", "absmax"))
        _check_choice("activations", self.activations, (None, "fp8"))
        _check_choice("rest", self.rest, ("bf16", "fp8"))
        ours = self.layout == "compressed-tensors"
        if self.rest == "fp8" and not ours:
            raise UsageError(f"--rest fp8: no engine reads FP8 beside {self.layout}; use compressed-tensors")
        if self.activations == "fp8" and not (ours and self.symmetric and self.group_size == 128):
            raise UsageError(
                "--activations fp8: engines ask for symmetric groups of 128 in the layout compressed-tensors"
            )
        if self.layout == "gptq" and not self.symmetric:
            raise UsageError(
                "--asymmetric: GPTQ stores zero points less one and no engine reads them for this model; use "
                "--layout compressed-tensors or awq"
            )

    @property
    def format(self) -> Format:
        """The format of quantized weights."""
        fmt: Format = _LAYOUTS[self.layout](self.group_size, self.symmetric, search=self.scale_search)
        return fmt


def plan_int8(
    checkpoint: Checkpoint,
    options: INT8Options,
    *,
    max_shard_size: int | None = None,
    partial: bool = False,
) -> Plan:
    """Returns the plan that quantizes every linear to INT8 but `kv_b_proj`, router, `lm_head`, `eh_proj`.

    Args:
        checkpoint: an FP8 or BF16 checkpoint, or one that is quantized otherwise.
        options: the scheme, and what is quantized.
        max_shard_size: bytes of tensors in an output shard; None keeps the source's boundaries.
        partial: the checkpoint is only a part of the model that `config.json` describes.

    Raises:
        FormatError: the source's quantization is not known here, or a weight does not fit the format.
        UsageError: a pattern that fits nothing, or that splits what engines load as one.
        PlanError: tensors that do not add up, all of them.
    """
    return _plan(checkpoint, "int8", options, options.format, None, max_shard_size, partial=partial)


def plan_int4(
    checkpoint: Checkpoint,
    options: INT4Options,
    *,
    max_shard_size: int | None = None,
    partial: bool = False,
) -> Plan:
    """Returns the plan that quantizes routed experts to INT4; arguments and errors as for `plan_int8`."""
    rest = _FP8 if options.rest == "fp8" else None
    return _plan(checkpoint, "int4", options, options.format, rest, max_shard_size, partial=partial)


def _plan(
    checkpoint: Checkpoint,
    kind: str,
    options: INT8Options | INT4Options,
    target: Format,
    rest: FP8Block | None,
    max_shard_size: int | None,
    *,
    partial: bool,
) -> Plan:
    stored = read_stored(checkpoint)
    mtp = tuple(checkpoint.config.mtp_layers)
    dropped = _dropped(stored, mtp) if options.mtp == "drop" else {}
    kept = [weight for weight in stored.weights if weight.code_name not in dropped]
    selection = select(
        kept,
        MODULES[kind],
        include=options.include,
        exclude=options.exclude,
        kept_layers=mtp if options.mtp == "keep" else (),
    )
    steps = [recode_step(w, _target(w, selection, target, rest)) for w in kept]
    check_plan(checkpoint, stored, steps, partial=partial, dropped=dropped)
    require_work(
        checkpoint, steps, f"no weight is to be changed, all that {kind} takes is {target.name} already"
    )
    config = with_quantization(
        checkpoint.config_json, _quantization_config(kept, selection, options, target, rest, mtp)
    )
    if options.mtp == "drop":
        config["num_nextn_predict_layers"] = 0
    said = asdict(options)
    return finish_plan(checkpoint, f"quantize {kind}", said, steps, config, max_shard_size, dropped=dropped)


def _dropped(stored: Stored, mtp_layers: Sequence[int]) -> dict[str, str]:
    """Returns the tensors of the MTP module.

    Raises:
        UsageError: there is none.
    """
    found = {
        name: "the MTP module is left out (--mtp drop)"
        for weight in stored.weights
        if weight.name.layer in mtp_layers and weight.name.layer is not None
        for name in weight.parts.values()
    }
    if not found:
        raise UsageError("--mtp drop: the checkpoint has no MTP module")
    return found


def _target(weight: StoredWeight, selection: Selection, target: Format, rest: FP8Block | None) -> Format:
    if weight in selection:
        return _fitting(target, weight.format)
    if rest is not None and _is_rest(weight, selection):
        return rest
    return weight.format if isinstance(weight.format, Dense) else Dense("BF16")


def _fitting(target: Format, own: Format) -> Format:
    """Returns the target with the scale dtype of a weight whose codes can then be moved as they are."""
    if isinstance(own, INT4) and isinstance(target, INT4):
        same_scales = replace(target, scale_dtype=own.scale_dtype)
        return same_scales if own.same_grid(same_scales) else target
    return target


def _is_rest(weight: StoredWeight, selection: Selection) -> bool:
    """Whether `--rest fp8` is about a weight."""
    is_linear = weight.name.module in FP8_REST and weight.name.parameter == "weight"
    return is_linear and weight not in selection


def _quantization_config(
    weights: Sequence[StoredWeight],
    selection: Selection,
    options: INT8Options | INT4Options,
    target: Format,
    rest: FP8Block | None,
    mtp_layers: Sequence[int],
) -> Mapping[str, Any]:
    in_rest = frozenset(w.name.prefix for w in weights if _is_rest(w, selection)) if rest else frozenset()
    coded = selection.modules | in_rest
    if isinstance(target, INT8Block):
        config = target.quantization_config()
        return config | {"ignored_layers": names(weights, coded)}
    unquantized = find_unquantized(weights, coded, mtp_layers)
    if isinstance(target, INT4GPTQ):
        return _gptq_config(target, patterns(unquantized, "-:"))
    if isinstance(target, INT4AWQ):
        return _awq_config(target, substrings(unquantized))
    groups: list[tuple[Format, Sequence[str]]] = [(target, ["Linear"])]
    if rest is not None:
        those_coded = [w for w in weights if w.name.prefix in coded]
        groups.append((rest, patterns(find_unquantized(those_coded, selection.modules, mtp_layers), "re:")))
    activations = options.activations if isinstance(options, INT4Options) else None
    return ct.quantization_config(groups, patterns(unquantized, "re:"), activations=activations)


def _gptq_config(target: INT4GPTQ, dynamic: Sequence[str]) -> dict[str, Any]:
    """Returns GPTQModel's `quantization_config`; no algorithm is named, for none was used."""
    return {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": {pattern: {} for pattern in dynamic},
        "group_size": target.group_size,
        "lm_head": False,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": target.symmetric,
    }


def _awq_config(target: INT4AWQ, unquantized: Sequence[str]) -> dict[str, Any]:
    return {
        "bits": 4,
        "group_size": target.group_size,
        "modules_to_not_convert": list(unquantized),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def _check_choice(name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        shown = ", ".join(str(choice) for choice in choices)
        raise UsageError(f"{name}: got {value!r}, expected one of {shown}")
