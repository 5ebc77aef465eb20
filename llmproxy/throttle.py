"""Failed keys: an address that has tried too many is asked to wait before its next one. Pure.

A key that nobody has is a look-up in the store, and a guess. The bound is for those who try one
after the other; whose key is known is let through from the same address.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv6Address as IPv6
from ipaddress import IPv6Network

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress

from llmproxy.buckets import Buckets
from llmproxy.errors import TooManyRequests


def source_of(peer: IAddress | None) -> str | None:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 one, as a single
    subscriber has that at least (RFC 6177). None: it can't be told, as on a Unix socket.
    """
    if isinstance(peer, IPv4Address):
        return peer.host
    if not isinstance(peer, IPv6Address):
        return None
    address = IPv6(peer.host)
    if address.ipv4_mapped is not None:  # a socket that takes both shows them so
        return str(address.ipv4_mapped)
    return str(IPv6Network((int(address), 64), strict=False))


class Throttle:
    """How many keys each address has tried in vain, `per_minute` of which are let go.

    Those that are being looked up when the bound is reached go on. `refused` is called for each
    request that has to wait.
    """

    def __init__(
        self, per_minute: int, monotonic: Callable[[], float], refused: Callable[[], None]
    ) -> None:
        self._failures = Buckets(per_minute)
        self._monotonic = monotonic
        self._refused = refused

    def check(self, peer: IAddress | None) -> None:
        """Raises TooManyRequests if the address has to wait."""
        source = source_of(peer)
        if source is None:
            return
        wait_s = self._failures.wait_s(source, self._monotonic())
        if wait_s:
            self._refused()
            raise TooManyRequests(
                "Too many invalid API keys came from this address; try again shortly.",
                wait_s=wait_s,
            )

    def failed(self, peer: IAddress | None) -> None:
        """A key from this address was looked up, and is none."""
        source = source_of(peer)
        if source is not None:
            self._failures.take(source, self._monotonic())
