"""The HTML page of a comparison of logits: one file with everything in it, which fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from importlib.resources import files
from pathlib import Path
from string import Template

from dsv3_tools import __version__
from dsv3_tools.checkpoint.durable import write_file
from dsv3_tools.errors import UsageError
from dsv3_tools.verify.logits_results import LogitsReport
from dsv3_tools.verify.page.charts import draw
from dsv3_tools.verify.page.sections import sections
from dsv3_tools.verify.page.text import element, join, visible

__all__ = ["render_page", "require_plotly", "write_page"]

_MAX_NAME = 100


def require_plotly() -> None:
    """Checks that a page could be written, before work begins whose result it would show.

    Raises:
        UsageError: plotly is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        raise UsageError(
            "--report: needs plotly, which is not installed; install it: pip install 'dsv3-tools[report]'"
        )


def write_page(report: LogitsReport, path: Path, *, command: str) -> None:
    """Writes a report as one HTML file, atomically, by way of a temporary file beside it.

    Args:
        report: what a comparison found.
        path: of the file; one that is there is replaced.
        command: that made the report, as it would be typed.

    Raises:
        UsageError: plotly is not installed.
        DestinationError: the file cannot be written.
    """
    page = render_page(report, command).encode()
    write_file(path, page, folder=path.parent)


def render_page(report: LogitsReport, command: str) -> str:
    """Returns a report as an HTML page.

    The page's policy lets the browser run only these two scripts, known by their hashes, and fetch nothing.

    Args:
        report: what a comparison found.
        command: that made the report.

    Raises:
        UsageError: plotly is not installed.
    """
    require_plotly()
    from plotly.offline import get_plotlyjs

    library, script = get_plotlyjs(), _part("page.js")
    charts = draw(report)
    names = [visible(path.name, _MAX_NAME) for path in (report.candidate, report.reference)]
    verdict = "Passed" if report.passed else "Failed"
    return Template(_part("page.html")).substitute(
        policy=_policy(library, script),
        title=join(f"{verdict}: {names[0]} against {names[1]}"),
        style=_part("page.css"),
        body=join(*sections(report, command, charts)),
        footer=element("footer", f"dsv3-tools {__version__}"),
        charts=_json(charts),
        library=library,
        script=script,
    )


def _part(name: str) -> str:
    return files("dsv3_tools.verify.page").joinpath(name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """Returns the content security policy: these scripts, inline styles, images in the page, nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _json(value: object) -> str:
    """Returns JSON that cannot end the script element that it is in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
