"""Clients that ask one thing after the other over one connection, and note how long each took."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from proxy import Answer, ProxyHandle
from twisted.internet.defer import Deferred, gatherResults


@dataclass
class Told:
    """What a client was told: a status, an answer, and seconds, for each request."""

    statuses: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    last: Answer = field(default_factory=lambda: Answer(b""))

    @property
    def median_s(self) -> float:
        """How long a request usually took."""
        return median(self.seconds)


async def ask(proxy: ProxyHandle, requests: Iterable[bytes]) -> Told:
    """Send them, each when the one before has been answered."""
    told = Told()
    client = await proxy.open()
    for request in requests:
        began = time.perf_counter()
        client.received = b""
        client.send(request)
        await client.when(lambda received: Answer(received).whole)
        told.seconds.append(time.perf_counter() - began)
        told.last = client.answer()
        assert told.last.whole, "the proxy hung up"
        told.statuses.append(told.last.status)
    await client.close()
    return told


def ask_all(proxy: ProxyHandle, *all_requests: Iterable[bytes]) -> Deferred[list[Told]]:
    """Each on a connection of its own, side by side."""
    asked = [Deferred.fromCoroutine(ask(proxy, requests)) for requests in all_requests]
    return gatherResults(asked, consumeErrors=True)
