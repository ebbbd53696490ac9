"""The `config.json` of a model and an MTP module together, whichever format each of them has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME, with_quantization
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.ignore import find_unquantized, names, patterns, substrings
from dsv3_tools.conversion.mtp_config import NEXTN_KEY, Entries, without_mtp
from dsv3_tools.errors import PlanError
from dsv3_tools.formats import INT4AWQ, Dense, Format
from dsv3_tools.formats.stored import StoredWeight, read_formats

__all__ = ["merged_config"]


def merged_config(
    main: Checkpoint,
    mtp: Checkpoint,
    weights: Sequence[StoredWeight],
    module: Sequence[StoredWeight],
    layers: range,
    restored: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns the `config.json` of `main` and an MTP module.

    Where the two come from one checkpoint it is that checkpoint's. Otherwise it is the model's, whose list
    of what is not quantized gets entries for what the module has unquantized.

    Args:
        main: the model.
        mtp: where the module comes from.
        weights: of the model.
        module: weights of the module, under the names that they will have.
        layers: the numbers of its layers.
        restored: the `config.json` of the checkpoint that both were split from, if it is known.

    Raises:
        PlanError: the model's format has no way to say how the module is stored.
    """
    key = "quantization_config"
    own = mtp.config_json if (key in mtp.config_json) == (key in main.config_json) else None
    for earlier in (restored, own):
        if earlier is not None and without_mtp(earlier, weights, module) == main.config_json:
            return dict(earlier)
    edited = {**main.config_json, NEXTN_KEY: len(layers)}
    problems = list(_foreign(main, mtp, weights, module))
    if problems:
        raise PlanError(str(main.source), problems)
    quantization = main.config_json.get("quantization_config")
    if not isinstance(quantization, dict):
        return edited
    return with_quantization(edited, _with_rules(main, mtp, quantization, weights, module, layers))


def _foreign(
    main: Checkpoint, mtp: Checkpoint, weights: Sequence[StoredWeight], module: Sequence[StoredWeight]
) -> Iterable[str]:
    """Yields the module's formats that the model's `config.json` does not describe."""
    stated = read_formats(main.config_json, main.where(CONFIG_NAME))
    known = {_comparable(fmt) for fmt in (*stated, *(weight.format for weight in weights))}
    others: dict[str, list[StoredWeight]] = {}
    for weight in module:
        if not isinstance(weight.format, Dense) and _comparable(weight.format) not in known:
            others.setdefault(weight.format.name, []).append(weight)
    ours = [fmt.name for fmt in stated]
    for name, found in others.items():
        what = f"{name} ({found[0].format})" if name in ours else name
        yield (
            f"{len(found)} weights of the MTP module in {mtp.source} are {what} ({found[0].full_name} "
            f"...), those of the model are {' and '.join(ours) or 'not quantized'}; its "
            "config.json cannot describe both; convert the module to the model's format, or to BF16 "
            "(convert ... --partial)"
        )


def _comparable(fmt: Format) -> Format:
    """Returns a format without what no engine asks about: AWQ's has zero points, whatever their values."""
    return replace(fmt, symmetric=False) if isinstance(fmt, INT4AWQ) else fmt


def _with_rules(
    main: Checkpoint,
    mtp: Checkpoint,
    quantization: Mapping[str, Any],
    weights: Sequence[StoredWeight],
    module: Sequence[StoredWeight],
    layers: range,
) -> dict[str, Any]:
    """Returns the model's `quantization_config` with a rule for all that the module has unquantized.

    Raises:
        PlanError: there can be no such rule, or the list covers what the module has quantized.
    """
    key, _ = _list_of(quantization)
    entries = [entry for entry in quantization.get(key) or () if isinstance(entry, str)]
    coded = [weight for weight in module if not isinstance(weight.format, Dense)]
    quantized = Entries(coded, layers)
    if coded and (covering := next((entry for entry in entries if quantized.concern(entry)), None)):
        raise PlanError(
            str(main.source),
            [
                f"config.json: {key} has {covering!r}, which covers quantized weights of the MTP module in "
                f"{mtp.source}; the model has such weights unquantized, convert the module likewise"
            ],
        )
    bare = [weight for weight in module if isinstance(weight.format, Dense)]
    lacking = [w for w in bare if not any(Entries([w], layers).concern(entry) for entry in entries)]
    experts = any(weight.name.is_routed_expert for weight in lacking)
    if experts and quantization.get("quant_method") == "blockwise_int8":
        raise PlanError(
            str(main.source),
            [
                f"routed experts of the MTP module in {mtp.source} are not quantized, and SGLang, the one "
                "engine for INT8 blocks, has no rule for that; quantize the module, too (quantize int8 "
                "--scheme block --partial)"
            ],
        )
    return _appended(quantization, key, _rules(quantization, weights, module, lacking, layers))


def _list_of(quantization: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the key of the list of what is not quantized, and what its patterns begin with, if any."""
    method = quantization.get("quant_method")
    if method == "gptq":
        return "dynamic", "-:"
    if method == "awq":
        return "modules_to_not_convert", ""
    if method in ("fp8", "blockwise_int8"):
        keys = ("ignored_layers", "modules_to_not_convert")
        return next((key for key in keys if quantization.get(key)), keys[0]), ""
    return "ignore", "re:"


def _rules(
    quantization: Mapping[str, Any],
    weights: Sequence[StoredWeight],
    module: Sequence[StoredWeight],
    lacking: Sequence[StoredWeight],
    layers: range,
) -> list[str]:
    """Returns entries for the weights that none covers, as quantizing the whole model would write them."""
    key, prefix = _list_of(quantization)
    coded = [w.name.prefix for w in (*weights, *module) if not isinstance(w.format, Dense)]
    if key == "ignored_layers" or quantization.get("quant_method") in ("fp8", "blockwise_int8"):
        experts = [w.name.prefix for w in lacking if w.name.is_routed_expert]
        whole = {f"{name.partition('.experts.')[0]}.experts" for name in experts}
        return [*sorted(whole), *names(lacking, coded)]
    unquantized = find_unquantized([*weights, *module], coded, layers)
    found = patterns(unquantized, prefix) if prefix else substrings(unquantized)
    ours = Entries(lacking, layers)
    return [entry for entry in found if ours.concern(entry)]


def _appended(quantization: Mapping[str, Any], key: str, rules: Sequence[str]) -> dict[str, Any]:
    """Returns a `quantization_config` with more entries in a list, or in a table, as GPTQ's is."""
    if not rules:
        return dict(quantization)
    if key == "dynamic":
        return {**quantization, key: {**(quantization.get(key) or {}), **{rule: {} for rule in rules}}}
    known = list(quantization.get(key) or ())
    return {**quantization, key: [*known, *(rule for rule in rules if rule not in known)]}
