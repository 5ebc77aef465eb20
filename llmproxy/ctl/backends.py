"""`llmproxyctl backends`: how the servers of all models do, as the running proxy's metrics say."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from llmproxy.config import Config, servers_of
from llmproxy.ctl.common import CommandError, Row, add_format, emit, read_page

COLUMNS = ("model", "server", "state", "in_flight", "circuit", "waiting")

# Twisted's endpoint strings: a colon within a value has a backslash before it.
_TCP = re.compile(r"tcp:(?:port=)?(\d+)(?::|$)")
_INTERFACE = re.compile(r":interface=((?:\\.|[^:\\])+)")

#: The values of a metric, by model and server.
Found = Mapping[tuple[str, str], float]


def add_parser(groups: Any) -> None:
    """Add the command."""
    parser = groups.add_parser("backends", help="how the servers of all models do now")
    parser.add_argument(
        "--url", help="of the proxy's admin site (default: what the configuration says)"
    )
    add_format(parser)
    parser.set_defaults(run=_backends)


def _backends(arguments: argparse.Namespace, config: Config) -> int:
    url = arguments.url or admin_url(config)
    emit(COLUMNS, rows(read_page(f"{url.rstrip('/')}/metrics"), config), arguments.format)
    return 0


def admin_url(config: Config) -> str:
    """Where the admin site listens. Raises CommandError where that is no TCP port."""
    for text in config.admin.listen:
        if found := _TCP.match(text):
            named = _INTERFACE.search(text)
            host = named[1].replace("\\", "") if named else "127.0.0.1"
            return f"http://{f'[{host}]' if ':' in host else host}:{found[1]}"
    raise CommandError("the admin site has no TCP port: give --url", code=2)


def rows(exposition: str, config: Config) -> list[Row]:
    """A row for each server: whether it is up, how many requests it has, how many processes leave
    it alone after failures, and how many requests wait for its model."""
    up = _values(exposition, "llmproxy_backend_up")
    in_flight = _values(exposition, "llmproxy_server_in_flight")
    circuit = _values(exposition, "llmproxy_server_circuit_open")
    waiting = _values(exposition, "llmproxy_queue_length")
    states = {None: "unknown", 0.0: "down", 1.0: "up"}
    return [
        (
            name,
            server.url,
            states[up.get((name, server.url))],
            _whole(in_flight.get((name, server.url))),
            "open" if circuit.get((name, server.url)) else "closed",
            _whole(waiting.get((name, ""))),
        )
        for name, backend in config.backends.items()
        for server in servers_of(backend)
    ]


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _values(exposition: str, name: str) -> Found:
    try:
        return {
            (sample.labels["model"], sample.labels.get("server", "")): sample.value
            for family in text_string_to_metric_families(exposition)
            for sample in family.samples
            if sample.name == name
        }
    except (ValueError, KeyError, IndexError) as error:
        raise CommandError("the proxy's metrics can't be read") from error
