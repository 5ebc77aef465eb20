"""`llmproxyctl`: keys, the ledger, usage, backends, and their own counters, for the operator.

Works on the SQLite file itself, whether or not the proxy runs; `backends` asks the running one.
Results go to stdout, all else to stderr. The exit code is 0, 1 for what could not be done, 2 for
what was not understood.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from llmproxy import __version__, config
from llmproxy.ctl import audit, backends, keys, ledger, usage
from llmproxy.ctl.common import CommandError, printable
from llmproxy.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    try:
        arguments = make_parser().parse_args(argv)
        path = config.find(arguments.config, os.environ)
        code: int = arguments.run(arguments, config.load(path, check=False))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # of argparse, after its own message
        return stop.code if isinstance(stop.code, int) else 2
    except CommandError as error:
        return _fail(str(error), error.code)
    except ConfigError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The command line, with the function of each command as `run`."""
    parser = argparse.ArgumentParser(prog="llmproxyctl", description="Operate llmproxy.")
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="the proxy's configuration (default: $LLMPROXY_CONFIG, or config.toml)",
    )
    parser.add_argument("--version", action="version", version=__version__)
    groups = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (keys, ledger, usage, backends, audit):
        group.add_parser(groups)
    return parser


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        sys.stderr.write(f"llmproxyctl: {printable(line)}\n")
    return code
