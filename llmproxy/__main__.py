"""`python -m llmproxy ARGS`: the same service as `twistd -n llmproxy ARGS`, in the foreground."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from twisted.scripts import twistd


def main(argv: Sequence[str] | None = None) -> None:
    """Run the service until it is told to stop (SIGTERM, SIGINT).

    `argv` holds the options, without the program's name; without it they are the process's own.
    No pidfile is written: who runs this in the foreground knows the process id, and the folder
    may be read-only. Raises SystemExit where twistd does: for wrong options with status 1.
    """
    args = sys.argv[1:] if argv is None else argv
    sys.argv = ["twistd", "--nodaemon", "--pidfile=", "--reactor=llmproxy", "llmproxy", *args]
    twistd.run()


if __name__ == "__main__":
    main()
