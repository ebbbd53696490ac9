"""What a user may say of a quantization, refused at once where no checkpoint could make sense of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dsv3_tools.errors import UsageError
from dsv3_tools.formats import INT4AWQ, INT4GPTQ, Format, INT4Packed, INT8Block, INT8Channel
from dsv3_tools.formats.int4 import GROUP_SIZES

__all__ = ["INT4Options", "INT8Options", "patterns"]

_LAYOUTS = {"compressed-tensors": INT4Packed, "gptq": INT4GPTQ, "awq": INT4AWQ}
_SCHEMES = {"channel": INT8Channel, "block": INT8Block}


@dataclass(frozen=True, kw_only=True)
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


def patterns(name: str, given: Sequence[str]) -> tuple[str, ...]:
    """Returns the patterns of an option.

    Raises:
        UsageError: a single string, whose letters would be taken for patterns.
    """
    if isinstance(given, str):
        raise UsageError(f"{name}: got the string {given!r}, expected a list of patterns")
    return tuple(given)


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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


def _check_choice(name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        shown = ", ".join(str(choice) for choice in choices)
        raise UsageError(f"{name}: got {value!r}, expected one of {shown}")
