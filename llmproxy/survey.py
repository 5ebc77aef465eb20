"""What a large body asks for, found in its parts: the few things that have to be known."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

from llmproxy import media
from llmproxy.endpoints import Endpoint
from llmproxy.jsonbytes import Member
from llmproxy.parts import KEPT, Part, Parts
from llmproxy.policy import WATCHED_WITHIN, Items

#: The most values in a body, besides numbers in a row. To find them takes 60 ms, in steps, or 1.2 s
#: where long ones stand within each other. As many messages of 4 KiB each as make a body of 32 MiB
#: have just as many.
MAX_VALUES = 100_000


class Place(NamedTuple):
    """Where a value stands: within which member of the body, and as what medium, or neither."""

    member: str | None
    medium: str | None


class Survey:
    """Goes through a body in `steps`, which raise InvalidJSON if it can't be taken.

    `body`: its members in short: strings are cut, arrays are Items, and objects have no more than
    the names that the policy looks for. `remote_url`: see `media.remote_url`.
    """

    def __init__(self, endpoint: Endpoint, raw: bytes) -> None:
        self.body: dict[str, Any] = {}
        self.remote_url: str | None = None
        self._endpoint = endpoint
        # No method of ours: who holds whom in a circle keeps the body until it is collected.
        self._parts = Parts(raw, Place(None, None), partial(_within, endpoint), MAX_VALUES)

    @property
    def members(self) -> list[Member]:
        """The members of the body, in order, after the last step."""
        return self._parts.members

    def steps(self) -> Iterator[None]:
        """Do it, some 100 us at a time."""
        for part in self._parts:
            if part is not None:
                self._take(part)
            yield

    def _take(self, part: Part[Place]) -> None:
        place, value = part.place, part.value
        if part.level == 1 and isinstance(value, dict):
            self.body.update((name, _in_short(inner)) for name, inner in value.items())
            self.remote_url = self.remote_url or media.remote_url(self._endpoint, value)
        elif part.level == 2 and place.member is not None:
            _add(self.body[place.member], value)
        if self.remote_url is None:
            self.remote_url = media.in_part(place.medium, value)


def _within(endpoint: Endpoint, place: Place, name: str) -> Place:
    if place.member is None:
        return Place(name, media.at_top(endpoint, name))
    return Place(place.member, media.within(place.medium, name))


def _in_short(value: object) -> object:
    if isinstance(value, str):
        return value[:KEPT]
    if not isinstance(value, (list, dict)):
        return value
    short: Items | dict[str, None] = Items() if isinstance(value, list) else {}
    _add(short, value)
    return short


def _add(short: Items | dict[str, None], value: list[Any] | dict[str, Any]) -> None:
    if isinstance(short, Items):
        short.add(cast(list[Any], value))
    else:
        short.update((name, None) for name in value if name in WATCHED_WITHIN)
