"""The front matter of a model card, and whose each part of a `README.md` is: generated, or a user's.

A user's lines are never written anew from what was read of them: a key that is not generated keeps its
text, comments and all. What was generated is written down in the generated part, so that a value that
differs from it is known to be the user's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv3_tools.errors import CheckpointError

__all__ = ["CARD_NAME", "MAX_CARD_BYTES", "Card", "parse_card", "read_metadata", "with_text_of"]

CARD_NAME = "README.md"
MAX_CARD_BYTES = 10_000_000
_MAX_FRONT_MATTER = 200_000

_BEGIN = "<!-- dsv3-tools: generated, changes here are lost -->"
_END = "<!-- dsv3-tools: end -->"
_MEMORY = re.compile(r"<!-- dsv3-tools: front matter (\{.*\}) -->")
_FENCE = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """A card taken apart.

    Attributes:
        lines: the front matter's text by key, in its order; a comment belongs to the key that follows.
        values: the same, parsed.
        generated: the front matter that was generated last.
        body: the text that was generated last.
        before: the user's text in front of the generated part.
        after: the user's text behind it.
        tail: comments at the end of the front matter.
    """

    lines: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    generated: Mapping[str, Any] = field(default_factory=dict)
    body: str = ""
    before: str = ""
    after: str = ""
    tail: str = ""

    def renewed(self, metadata: Mapping[str, Any], body: str) -> str:
        """Returns the card's text with a new generated part, and all that is the user's as it was."""
        merged = self._merged(metadata)
        head = "".join(self._text(key, value) for key, value in merged.items()) + self.tail
        memory = json.dumps(metadata, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e")
        made = f"{_BEGIN}\n<!-- dsv3-tools: front matter {memory} -->\n{body}\n{_END}\n"
        before = self.before or "\n"
        before += "" if before.endswith("\n") else "\n"
        return f"---\n{head}---\n{before}{made}{self.after}"

    def _merged(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the new front matter: the user's values win, and what the user removed stays away."""
        merged = dict(self.values)
        for key, value in self.generated.items():
            if key not in metadata and merged.get(key) == value:
                del merged[key]
        for key, value in metadata.items():
            earlier = self.generated.get(key)
            if key == "tags" and isinstance(merged.get(key), list):
                merged[key] = _merged_tags(value, merged[key], earlier or [])
            elif key in merged and merged[key] != earlier:
                continue
            elif key in merged or key not in self.generated:
                merged[key] = value
        # All ours: in the order of a new card, so that what was there before leaves no trace.
        ours = all(self.generated.get(key) == value for key, value in self.values.items())
        order = [*metadata, *merged] if ours else merged
        return {key: merged[key] for key in order if key in merged}

    def _text(self, key: str, value: Any) -> str:
        """Returns the lines of one key: those that are there, or new ones if it has another value."""
        if key in self.values and self.values[key] == value:
            return self.lines[key]
        import yaml

        comments = re.match(r"(?:[ \t]*(?:#.*)?\r?\n)*", self.lines.get(key, ""))
        dumped: str = yaml.safe_dump({key: value}, allow_unicode=True, width=10_000, sort_keys=False)
        return (comments[0] if comments is not None else "") + dumped


def with_text_of(user: bytes, made: bytes) -> bytes:
    """Returns the card `made`, with what a user has written around an earlier one, the card `user`.

    With a user's text in both, `made` stays as it is; so does `user` if it cannot be read as a card.
    """
    try:
        theirs, ours = parse_card(user, CARD_NAME), parse_card(made, CARD_NAME)
    except CheckpointError:
        return user
    has_text = ours.before.strip() or ours.after.strip() or dict(ours.values) != dict(ours.generated)
    return made if has_text or not ours.body else theirs.renewed(ours.generated, ours.body).encode()


def _merged_tags(generated: list[str], found: list[Any], earlier: list[str]) -> list[Any]:
    """Returns the generated tags but those that the user removed, then the user's own."""
    kept = [tag for tag in generated if tag in found or tag not in earlier]
    return kept + [tag for tag in found if tag not in earlier and tag not in kept]


def parse_card(text: bytes, where: str) -> Card:
    """Returns a `README.md` taken apart.

    Raises:
        CheckpointError: front matter that is no YAML, or half of the marks of the generated part.
    """
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: is not UTF-8") from None
    lines, values, tail, rest = _front_matter(decoded, where)
    begins = [match.start() for match in re.finditer(rf"^{_BEGIN}\r?$", rest, re.MULTILINE)]
    ends = list(re.finditer(rf"^{_END}[ \t]*(?:\r?\n|\Z)", rest, re.MULTILINE))
    if not begins and not ends:
        before = rest if not rest.strip() else rest.rstrip("\n") + "\n\n"
        return Card(lines, values, {}, "", before if rest.strip() else "", "", tail)
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0].start():
        raise CheckpointError(
            f"{where}: has {len(begins)} lines {_BEGIN!r} and {len(ends)} lines {_END!r}, expected one of "
            "each, in this order; put them back around the generated part, or remove it with both"
        )
    made = rest[begins[0] : ends[0].start()]
    body = "\n".join(made.splitlines()[2:])
    return Card(lines, values, _memory(made), body, rest[: begins[0]], rest[ends[0].end() :], tail)


def read_metadata(text: bytes) -> dict[str, Any]:
    """Returns the front matter of somebody's card; empty where it has none that can be read."""
    try:
        return dict(parse_card(text, CARD_NAME).values)
    except CheckpointError:
        return {}


def _memory(generated: str) -> dict[str, Any]:
    """Returns the front matter that the generated part says was generated with it."""
    match = _MEMORY.search(generated)
    try:
        found = json.loads(match[1]) if match is not None else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _front_matter(text: str, where: str) -> tuple[dict[str, str], dict[str, Any], str, str]:
    """Returns the front matter's lines and values by key, its last comments, and what follows it."""
    match = _FENCE.match(text)
    if match is None:
        return {}, {}, "", text.removeprefix("\ufeff")
    if len(match["yaml"]) > _MAX_FRONT_MATTER:
        raise CheckpointError(f"{where}: its front matter has more than {_MAX_FRONT_MATTER:,} characters")
    lines, values, tail = _keys(match["yaml"], where)
    return lines, values, tail, text[match.end() :]


def _keys(text: str, where: str) -> tuple[dict[str, str], dict[str, Any], str]:
    import yaml

    try:
        # An alias may stand for what is made of aliases: some lines could become gigabytes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise CheckpointError(f"{where}: its front matter has an alias (*name), which is not read")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 2})" if mark is not None else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise CheckpointError(f"{where}: its front matter is not YAML: {problem}{place}") from None
    if root is None:
        return {}, {}, text
    if not isinstance(values, dict) or root.flow_style or not all(isinstance(key, str) for key in values):
        raise CheckpointError(f"{where}: its front matter is not a list of keys, one to a line, with values")
    if len(values) != len(root.value):
        raise CheckpointError(f"{where}: its front matter has a key twice")
    marks = [key.start_mark for key, _ in root.value]
    if any(mark.column for mark in marks):
        raise CheckpointError(f"{where}: its front matter has keys that are not at the beginning of a line")
    starts = [0, *(_comments_start(text, mark.index) for mark in marks[1:])]
    end = _comments_start(text, len(text))
    lines = {
        key: text[start:stop] for key, start, stop in zip(values, starts, [*starts[1:], end], strict=True)
    }
    return lines, values, text[end:]


def _comments_start(text: str, end: int) -> int:
    """Returns where the comments and empty lines in front of a place begin."""
    while end:
        begin = text.rfind("\n", 0, end - 1) + 1
        if not re.fullmatch(r"[ \t]*(?:#.*)?\r?\n?", text[begin:end]):
            break
        end = begin
    return end
