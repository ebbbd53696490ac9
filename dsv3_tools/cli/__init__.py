"""The `dsv3` command: the only part of the package that writes to the terminal."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Runs the command line and exits with the code that `dsv3_tools.errors` gives each outcome."""
    import io
    import os
    import sys
    import threading

    from dsv3_tools.cli.app import run_command_line

    # What it has to say of each attempt, in lines of its own and with signed URLs, comes as one line of ours.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    code = run_command_line(sys.argv[1:])
    if code > 128 and threading.active_count() > 1:
        # Asked to stop: no waiting for what cannot be stopped, such as an upload of gigabytes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
