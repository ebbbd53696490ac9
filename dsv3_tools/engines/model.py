"""A checkpoint as the rules see it: names, specs and `config.json`, on disk or only planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.names import parse_name
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.engines.schemes import Scheme, declared_schemes, table
from dsv3_tools.engines.storage import Signature, Storage, storage_of

__all__ = ["ModelView", "ModuleGroup"]

_IGNORED_SUFFIXES = (
    ".inv_freq",
    ".k_scale",
    ".v_scale",
    ".w1.input_scale",
    ".w2.input_scale",
    ".w3.input_scale",
)


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """The modules of one layer that are of one kind and stored alike: all experts' gates, mostly.

    Attributes:
        kind: the module without layer and expert numbers ("mlp.experts.down_proj").
        layer: the layer's number; None outside of layers.
        is_linear: whether it is a linear that the released checkpoints quantize.
        storage: how each of them is stored.
        modules: their full names.
    """

    kind: str
    layer: int | None
    is_linear: bool
    storage: Storage
    modules: list[str]

    @property
    def name(self) -> str:
        """The first module's full name."""
        return self.modules[0]


@dataclass(frozen=True, eq=False)
class ModelView:
    """Names, specs and configuration of a checkpoint that exists or is planned.

    Attributes:
        specs: every tensor's spec, by name.
        config: `config.json`, parsed.
        weight_map: every tensor's shard, by name; empty if not known yet.
        has_index_metadata: whether the index has a "metadata" key.
    """

    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    has_index_metadata: bool = True

    @cached_property
    def dimensions(self) -> ModelConfig:
        """The model's dimensions.

        Raises:
            CheckpointError: `config` is not of the family.
        """
        return ModelConfig.from_dict(self.config)

    @cached_property
    def quantization_config(self) -> Mapping[str, Any]:
        """`quantization_config`; empty if there is none."""
        return table(self.config.get("quantization_config"))

    @cached_property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes that `quantization_config` declares; none without it."""
        return declared_schemes(self.quantization_config) if self.quantization_config else ()

    @cached_property
    def expected(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the unquantized model that `config` describes."""
        return dense_tensors(self.dimensions)

    @cached_property
    def groups(self) -> tuple[ModuleGroup, ...]:
        """All modules of the family, by layer, kind and storage."""
        return self._grouped[0]

    @cached_property
    def linears(self) -> tuple[ModuleGroup, ...]:
        """The groups of linears that may be quantized."""
        return tuple(group for group in self.groups if group.is_linear)

    @cached_property
    def quantized(self) -> tuple[ModuleGroup, ...]:
        """The groups, linears or not, whose weights are quantized."""
        return tuple(group for group in self.groups if group.storage.is_quantized)

    @cached_property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block, 128 where nothing is said."""
        return next((scheme.block for scheme in self.schemes if scheme.block), (128, 128))

    @cached_property
    def missing(self) -> list[str]:
        """Tensors of the unquantized model that are there in no form, in the model's order."""
        return [
            name
            for name in self.expected
            if name not in self.specs
            and not (
                name.endswith(".weight")
                and (name[:-6] + "weight_packed" in self.specs or name[:-6] + "qweight" in self.specs)
            )
        ]

    @cached_property
    def unexpected(self) -> list[str]:
        """Tensors that no part of this model has; those of layers after the last one are `extra`."""
        found = list(self._grouped[1])
        for group in self.groups:
            if group.layer is None or group.layer < self._end:
                found += [m for m in group.modules if m + ".weight" not in self.expected]
        return sorted(found)

    @cached_property
    def extra(self) -> list[str]:
        """Modules of layers that `config` does not count."""
        later = [group for group in self.groups if group.layer is not None and group.layer >= self._end]
        return [module for group in later for module in group.modules]

    @cached_property
    def has_main(self) -> bool:
        """Whether there are weights of the model itself, not only of its MTP module."""
        return any(group.layer in self.dimensions.main_layers for group in self.groups)

    @cached_property
    def has_mtp(self) -> bool:
        """Whether there are weights of the MTP module that `config` counts."""
        return any(group.layer in self.dimensions.mtp_layers for group in self.groups)

    def is_mtp(self, layer: int | None) -> bool:
        """Whether `layer` is in the MTP module, counted by `config` or not."""
        return layer is not None and layer >= self.dimensions.main_layers.stop

    @property
    def _end(self) -> int:
        return self.dimensions.mtp_layers.stop

    @cached_property
    def _grouped(self) -> tuple[tuple[ModuleGroup, ...], list[str]]:
        """All groups, and the names that belong to no module of the family."""
        parts: dict[str, list[tuple[str, TensorSpec]]] = {}
        for name, spec in self.specs.items():
            module, _, parameter = name.rpartition(".")
            parts.setdefault(module, []).append((parameter, spec))
        groups: dict[tuple[str, int | None, Signature], list[str]] = {}
        linear: dict[str, bool] = {}
        strangers: list[str] = []
        for module, found in parts.items():
            parsed = parse_name(module + ".weight")
            if parsed is None:
                names = [f"{module}.{parameter}".removeprefix(".") for parameter, _ in found]
                strangers += [name for name in names if not name.endswith(_IGNORED_SUFFIXES)]
                continue
            linear[parsed.module] = parsed.is_fp8_linear
            signature = tuple(sorted(found, key=itemgetter(0)))
            groups.setdefault((parsed.module, parsed.layer, signature), []).append(module)
        made = []
        for (kind, layer, signature), modules in groups.items():
            logical = self.expected.get(modules[0] + ".weight")
            storage = storage_of(signature, logical.shape if logical else None)
            made.append(ModuleGroup(kind, layer, linear[kind], storage, modules))
        return tuple(made), strangers
