"""The `dsv3` command: the only part of the package that writes to the terminal."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Runs the command line and exits with the code that `dsv3_tools.errors` gives each outcome."""
    import io
    import sys

    from dsv3_tools.cli.app import run_command_line

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    sys.exit(run_command_line(sys.argv[1:]))
