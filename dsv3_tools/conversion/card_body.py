"""The text of a model card: what a result is, how it was made, what changed, and what it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.conversion.card_command import command_words
from dsv3_tools.conversion.card_figures import Figures
from dsv3_tools.conversion.card_serving import role, serving_lines
from dsv3_tools.conversion.card_text import code, escape, fenced, nbytes, shell, table
from dsv3_tools.engines import FORMATS, ModelView

__all__ = ["CardSource", "card_body", "card_metadata"]

_TAGS = {
    "bf16": ("bf16",),
    "fp8-block": ("fp8",),
    "fp8-ct-block": ("fp8", "compressed-tensors"),
    "fp8-ct-channel": ("fp8", "compressed-tensors"),
    "int8-block": ("int8", "w8a8"),
    "int8-channel": ("int8", "w8a8", "compressed-tensors"),
    "w8a8-int8": ("int8", "w8a8"),
    "int4-ct": ("int4", "w4a16", "compressed-tensors"),
    "w4a8-ct": ("int4", "w4a8", "compressed-tensors"),
    "gptq": ("int4", "w4a16", "gptq"),
    "awq": ("int4", "w4a16", "awq"),
}
"""Tags on the Hub by format: number type, weights and activations in bits, quantization method."""

_RECODES = ("fp8-to-bf16", "bf16-to-fp8", "int8-to-bf16", "int4-to-bf16", "quantize int8", "quantize int4")
_RELATIONS = dict.fromkeys(_RECODES, "quantized") | {"merge-mtp": "merge"}
"""What Hugging Face calls the relation to the base model; a part of a model is none of those."""

_PLACES = {"source": "SOURCE", "mtp": "MTP", "like": "ORIGINAL_FP8"}


@dataclass(frozen=True)
class CardSource:
    """Everything that a card is made of: equal facts, equal cards.

    Attributes:
        manifest: of the result.
        sha256: what the manifest states of itself.
        view: the result as the rules about engines see it; None for rank shards, which have no index.
        figures: of `dsv3 verify`.
    """

    manifest: Mapping[str, Any]
    sha256: str
    view: ModelView | None
    figures: Figures

    @property
    def operation(self) -> str:
        """The command."""
        return str(self.manifest["operation"])

    @cached_property
    def role(self) -> str:
        """What the result is; see `card_serving.role`."""
        return role(self.view)

    @property
    def calibration(self) -> Mapping[str, Any]:
        """How it was calibrated; empty if it was not."""
        found: Mapping[str, Any] = self.manifest["options"].get("calibration") or {}
        return found

    @cached_property
    def source_card(self) -> Mapping[str, Any]:
        """What the source's own card says."""
        found: Mapping[str, Any] = self.manifest.get("source_card", {})
        return found

    @cached_property
    def repositories(self) -> Mapping[str, Mapping[str, str]]:
        """Sources on the Hub: repo and commit by origin."""
        found: Mapping[str, Mapping[str, str]] = self.manifest.get("repositories", {})
        return found

    @cached_property
    def base_models(self) -> list[str]:
        """The models on the Hub that this was made from, as far as that is known."""
        known = [self.repositories[o]["repo"] for o in ("source", "mtp") if o in self.repositories]
        said = self.source_card.get("base_model", [])
        return list(dict.fromkeys(known)) or (list(said) if isinstance(said, list) else [said])

    @cached_property
    def formats(self) -> list[str]:
        """The formats that `config.json` declares, as names of `engines.FORMATS`."""
        if self.view is None:
            return []
        return [s.format for s in self.view.schemes if s.format in FORMATS] or (
            [] if self.view.schemes else ["bf16"]
        )

    @property
    def name(self) -> str:
        """What the model is called: its repository's name, or its type."""
        if self.base_models:
            return self.base_models[0].rpartition("/")[2]
        kind = self.view.config.get("model_type") if self.view is not None else None
        return f"{kind if isinstance(kind, str) else 'DeepSeek-V3-family'} model"


def card_metadata(card: CardSource) -> dict[str, Any]:
    """Returns the front matter: strings and lists of them."""
    found: dict[str, Any] = {}
    if card.base_models:
        found["base_model"] = card.base_models[0] if len(card.base_models) == 1 else card.base_models
    if card.base_models and card.operation in _RELATIONS:
        found["base_model_relation"] = _RELATIONS[card.operation]
    if card.role in ("model", "module"):
        found["library_name"] = card.source_card.get("library_name", "transformers")
    found["pipeline_tag"] = card.source_card.get("pipeline_tag", "text-generation")
    taken = ("license", "license_name", "license_link", "language")
    found |= {key: card.source_card[key] for key in taken if key in card.source_card}
    found["tags"] = list(dict.fromkeys(_tags(card)))
    found["quantized_by"] = f"dsv3-tools {card.manifest['program']['version']}"
    return found


def _tags(card: CardSource) -> Iterator[str]:
    yield "dsv3-tools"
    yield "deepseek_v3"
    for name in card.formats:
        yield from _TAGS[name]
    if card.role == "ranks":
        yield "deepseek-infer"
    if card.view is not None and card.view.has_mtp:
        yield "mtp"
    if card.role == "nextn":
        yield "nextn"


def card_body(card: CardSource) -> str:
    """Returns the generated part of a card."""
    lines = [f"# {escape(card.name)}{_what(card)}", "", _sentence(card), ""]
    for title, section in (
        ("How it was made", _made(card)),
        ("What changed", _changed(card)),
        ("How to use it", _used(card)),
        ("Figures", _figures(card)),
        ("How to check it", _checked(card)),
        ("Files", _files(card)),
    ):
        if section:
            lines += [f"## {title}", "", *section, ""]
    return "\n".join(lines)


def _what(card: CardSource) -> str:
    """Returns the end of the title."""
    formats = " and ".join(FORMATS[name] for name in card.formats)
    kinds = {
        "model": f": {formats}",
        "module": f": MTP module, {formats}",
        "nextn": f": MTP module as NextN, {formats}",
        "ranks": ": rank shards for DeepSeek's inference demo",
    }
    return kinds[card.role].removesuffix(", ").removesuffix(": ")


def _sentence(card: CardSource) -> str:
    base = " and ".join(f"[{escape(m)}](https://huggingface.co/{m})" for m in card.base_models)
    base = base or "a checkpoint of the DeepSeek-V3 family"
    formats = " and ".join(FORMATS[name] for name in card.formats)
    how = " without training or calibration"
    if card.calibration:
        tokens = card.calibration["tokens"]
        count = f"{int(tokens['sequences'])} x {int(tokens['length'])}"
        how = (
            f", calibrated ({escape(str(card.calibration['method']))}) with {count} tokens, without training"
        )
    done = {
        "split-mtp --main": f"This is {base} without its MTP module, byte for byte",
        "split-mtp --mtp": f"This is the MTP module of {base} alone, byte for byte",
        "merge-mtp": f"This is {base} with an MTP module put beside it, byte for byte",
        "to-deepseek-infer": f"This is {base}, cut for DeepSeek's own inference demo",
    }.get(card.operation, f"This is {base}, rewritten as {formats}{how}")
    return f"{done}, by dsv3-tools {escape(card.manifest['program']['version'])}."


def _place(card: CardSource, origin: str) -> str:
    """Returns what a command line says for a source: its repository, or a word in capitals."""
    found = card.repositories.get(origin)
    return _PLACES[origin] if found is None else f"hf://{found['repo']}@{found['commit']}"


def _made(card: CardSource) -> list[str]:
    program = card.manifest["program"]
    places = {origin: _place(card, origin) for origin in _PLACES} | {"calibration": "TOKENS"}
    sources = [
        f"- {origin}: [{escape(r['repo'])}](https://huggingface.co/{r['repo']}), commit {code(r['commit'])}"
        for origin, r in card.repositories.items()
    ]
    return [
        *fenced([shell(command_words(card.manifest, places, "DIR"))], "sh"),
        "",
        "`DIR` is this directory, or its place on the Hub once it is there.",
        "",
        *sources,
        *(
            [f"- TOKENS: int64 ids with the SHA-256 {code(str(card.calibration['tokens']['sha256']))}"]
            if card.calibration
            else []
        ),
        f"- program: dsv3-tools {escape(program['version'])}, plan version {int(program['plan_version'])}",
        f"- plan: {code(card.manifest['plan_digest'])}",
        f"- manifest: {code(card.sha256)} (SHA-256; it has that of every file)",
    ]


def _changed(card: CardSource) -> list[str]:
    changes = card.manifest.get("changes", [])
    heads = ("part", "before", "after", "count", "bytes before", "bytes after")
    rows = [
        (
            ("MTP: " if change["mtp"] else "") + escape(change["part"]),
            escape(change["before"]),
            escape(change["after"]),
            f"{change['count']:,}",
            nbytes(change["nbytes_before"]),
            nbytes(change["nbytes_after"]),
        )
        for change in changes
    ]
    return [*table(heads, rows), "", *(f"- {line}" for line in _notes(card, changes))]


def _notes(card: CardSource, changes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields what the table does not show."""
    moved = {change["part"] for change in changes if change["after"] != "copied"}
    if moved and (same := list(dict.fromkeys(c["part"] for c in changes if c["part"] not in moved))):
        yield f"Copied byte for byte: {escape(', '.join(same))}."
    bias = [(c["before"], c["after"]) for c in changes if c["part"] == "router's correction bias"]
    if bias and set(bias) == {("F32", "copied")}:
        yield "The router's correction bias stays in float32."
    if card.role == "model" and card.view is not None:
        yield f"The MTP module is {'part of it' if card.view.has_mtp else 'not part of it'}."
    for reason in dict.fromkeys(card.manifest["dropped"].values()):
        names = [name for name, why in card.manifest["dropped"].items() if why == reason]
        yield f"Left out: {len(names):,} tensors, {escape(reason)}: {escape(list_names(names))}."
    for what, keys in card.manifest.get("config_changes", {}).items():
        if keys:
            yield f"Keys of config.json that were {escape(what)}: {', '.join(map(code, keys))}."
    if compared := card.manifest["blocks_compared"]:
        kept = card.manifest["blocks_kept"]
        yield f"{kept:,} of {compared:,} blocks have the scale of the original FP8 checkpoint."
    if bad := card.manifest["nonfinite"]:
        yield f"NaN or infinite: {sum(bad.values()):,} elements in {len(bad):,} tensors of the source."


def _used(card: CardSource) -> list[str]:
    if card.view is not None:
        scripts = ", ".join(code(name) for name in card.manifest["files"] if name.endswith(".py"))
        warning = f"{scripts}: run only if an engine is told to trust remote code."
        return [*serving_lines(card.view), *(["", warning] if scripts else [])]
    ranks = int(card.manifest["options"]["model_parallel"])
    places = "--ckpt-path DIR --config DIR/deepseek_infer_config.json"
    return fenced([f"torchrun --nproc-per-node {ranks} generate.py {places} --interactive"], "sh")


def _figures(card: CardSource) -> list[str]:
    rows = [
        (f"verify {escape(kind)}", escape(name), escape(value))
        for kind, figures in card.figures.items()
        for name, value in figures.items()
    ]
    return table(("by", "figure", "value"), rows)


def _checked(card: CardSource) -> list[str]:
    lines = ["dsv3 verify integrity DIR"]
    if card.operation in _RECODES and not card.manifest["dropped"]:
        lines.append(shell(["dsv3", "verify", "tensors", _place(card, "source"), "DIR"]))
    return fenced(lines, "sh")


def _files(card: CardSource) -> list[str]:
    files = card.manifest["files"]
    shards = [name for name in files if name.endswith(".safetensors")]
    size = nbytes(sum(files[name]["nbytes"] for name in shards))
    others = [code(name) for name in files if name not in shards]
    return [f"{len(shards):,} shards, {size}; {', '.join(others)}."]
