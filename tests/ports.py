"""Ports for processes of their own, which have to be told theirs before they listen."""

from __future__ import annotations

import random
import socket

# Below those that the kernel gives to outgoing connections, of which one could take a port between
# the moment that it is found free and the moment that it is listened on.
FIRST, LAST = 20_000, 32_000


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    while True:
        port = random.randrange(FIRST, LAST)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
