"""`docs/engines.md` says what the data say. Run this file to write its table anew."""

from __future__ import annotations

import re
from pathlib import Path

from dsv3_tools.engines import ENGINES, FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
MARK = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end -->)", re.DOTALL)
SHOWN = {"loads": "yes", "flag": "yes, but", "refused": "no", "misread": "**misread**"}


def tables() -> str:
    lines = ["", "| | " + " | ".join(f"{e.title}<br>{e.version}" for e in ENGINES.values()) + " |"]
    lines.append("|---" * (len(ENGINES) + 1) + "|")
    for name, title in FORMATS.items():
        cells = (SHOWN[engine.support(name).level] for engine in ENGINES.values())
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "What is more than a plain yes, and where each entry comes from:", ""]
    for engine in ENGINES.values():
        for name, support in engine.formats.items():
            note = f": {engine.title} {support.note}" if support.note else ""
            lines.append(f"- **{engine.title}**, {FORMATS[name]}{note} ({support.source})")
    return "\n".join([*lines, "", ""])


def test_the_page_says_what_the_data_say() -> None:
    (found,) = MARK.findall(PAGE.read_text())
    assert found == tables()


def test_every_entry_says_how_it_is_known() -> None:
    for engine in ENGINES.values():
        for support in engine.formats.values():
            assert re.search(r"\((tried|read|page)|deduced", support.source), support
        for _, source in engine.kv_b.values():
            assert "(read)" in source


if __name__ == "__main__":
    PAGE.write_text(MARK.sub(lambda _: tables(), PAGE.read_text()))
