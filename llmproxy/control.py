"""What supervisor and workers tell each other: JSON objects, one a line, over a pair of pipes.

    supervisor                                     worker
       start (number, config, listeners,
              pems)                         --->
                                            <---   ready (metrics, checks), or failed (reason)
                                            <---   report (metrics, checks), once a second
       reload (config, pems)                --->
       down (servers): what is down now     --->
       recover: another process has ended   --->
       stop (linger, relieved)              --->
       cut: wait for no stream any longer   --->
       leave: the others have ended         --->
                                            <---   report, the last one

Each also notices when the other one is gone, as the pipes close then.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from llmproxy import config
from llmproxy.config import Config

#: The descriptors of a worker: its ends of the pipes, the memory of `loads.py`, and the first of
#: the sockets it listens on.
FROM_SUPERVISOR, TO_SUPERVISOR, LOADS, FIRST_LISTENER = 3, 4, 5, 6

Message = dict[str, Any]


def encode(kind: str, **content: object) -> bytes:
    """A message, as a line."""
    return json.dumps({"kind": kind, **content}, separators=(",", ":")).encode() + b"\n"


class Decoder:
    """Bytes in any split in, messages out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from map(json.loads, lines)


def config_to_json(settings: Config) -> dict[str, Any]:
    """The settings in the shape of the file, secrets and all; `config_from_json` reads them.

    A worker does not read the file itself: it may have been changed since it was found good.
    """
    return _section(settings)


def config_from_json(given: Mapping[str, Any]) -> Config:
    """The inverse. Raises ConfigError."""
    return config.parse(given, Path("/"))


def _section(section: Any) -> dict[str, Any]:
    found = {}
    for each in fields(section):
        value = getattr(section, each.name)
        if value != each.default:
            found[each.name] = _plain(value)
    if isinstance(section, config.Backend):
        del found["name"]  # stands before the table
    for key in ("url", "urls"):
        if key in found:
            found[key] = _with_v1(found[key])
    return found


def _with_v1(value: Any) -> Any:
    """What `parse` takes away, once."""
    return [f"{url}/v1" for url in value] if isinstance(value, list) else f"{value}/v1"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return _section(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value
