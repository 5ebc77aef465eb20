"""What our channel makes of bytes: the requests that it understands, and its answers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from memory import Server
from twisted.internet.task import Clock

REFUSED = range(400, 500)


@dataclass
class Reading:
    """`served`: method, target and body of each request that came whole, each answered with its
    own body. `statuses`: of all answers. `is_open`: more may come."""

    served: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    sent: bytes = b""
    is_open: bool = True

    @property
    def refused(self) -> bool:
        """The last answer says no, and the connection is closed."""
        return bool(self.statuses) and self.statuses[-1] in REFUSED and not self.is_open

    @property
    def waits(self) -> bool:
        """Nothing is whole yet."""
        return not self.statuses and self.is_open


def read(data: bytes, size: int | None = None) -> Reading:
    """Send `data`, in pieces of `size` bytes, to a server that echoes."""
    clock = Clock()
    server, reading = Server(clock), Reading()
    answered = 0
    for start in range(0, len(data), size or len(data)):
        if not server.wire.connected:
            break
        server.send(data[start : start + (size or len(data))])
        while answered < len(server.requests) and server.requests[answered].upload.whole:
            request = server.requests[answered]
            answered += 1
            body = request.upload.at_once(2**20) or b""
            reading.served.append((request.method, request.uri, body))
            request.answer(200, [], body)
        clock.advance(0)
    reading.sent = server.sent
    reading.statuses = [int(each) for each in re.findall(rb"HTTP/1\.[01] (\d{3}) ", server.sent)]
    reading.is_open = server.wire.connected
    server.leave()
    clock.advance(0)
    return reading
