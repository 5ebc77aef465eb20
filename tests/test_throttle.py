"""Failed keys by address: the pure part. The rest is in `threats/test_keys_throttle.py`."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.address import HostnameAddress, IPv4Address, IPv6Address, UNIXAddress

from llmproxy.buckets import MOST_BUCKETS
from llmproxy.errors import TooManyRequests
from llmproxy.throttle import Throttle, source_of


def v4(host: str) -> IPv4Address:
    return IPv4Address("TCP", host, 1)


def v6(host: str) -> IPv6Address:
    return IPv6Address("TCP", host, 1)


class Watch:
    """A throttle with its clock. `refused`: how often somebody had to wait."""

    def __init__(self, per_minute: int) -> None:
        self.now = 100.0
        self.refused = 0
        self.throttle = Throttle(per_minute, lambda: self.now, self._count)

    def _count(self) -> None:
        self.refused += 1

    def waits(self, peer: Any) -> str | None:
        """What an address is told that has to wait."""
        try:
            self.throttle.check(peer)
        except TooManyRequests as error:
            return f"{error.status} {error.code} {error.headers['Retry-After']}"
        return None


@pytest.mark.parametrize(
    ("peer", "source"),
    [
        (v4("192.0.2.1"), "192.0.2.1"),
        (v6("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64"),
        (v6("2001:db8:1:2::"), "2001:db8:1:2::/64"),
        (v6("2001:db8:1:3::1"), "2001:db8:1:3::/64"),
        (v6("::ffff:192.0.2.1"), "192.0.2.1"),
        (v6("::ffff:c000:201"), "192.0.2.1"),
        (v6("fe80::1%eth0"), "fe80::/64"),
        (v6("::1"), "::/64"),
        (UNIXAddress("/run/x"), None),
        (UNIXAddress(None), None),
        (HostnameAddress(b"h", 1), None),
        (None, None),
    ],
    ids=repr,
)
def test_an_address_counts_by_what_one_subscriber_has(peer: Any, source: str | None) -> None:
    assert source_of(peer) == source


def test_an_address_may_fail_so_often_and_then_waits_its_turn() -> None:
    watch = Watch(3)
    for _ in range(3):
        assert watch.waits(v4("192.0.2.1")) is None
        watch.throttle.failed(v4("192.0.2.1"))
    assert watch.waits(v4("192.0.2.1")) == "429 rate_limit_exceeded 20"
    assert watch.refused == 1
    watch.now += 19.5
    assert watch.waits(v4("192.0.2.1")) == "429 rate_limit_exceeded 1"
    watch.now += 0.5
    assert watch.waits(v4("192.0.2.1")) is None


def test_failures_that_were_under_way_already_make_the_wait_no_longer() -> None:
    watch = Watch(3)
    for _ in range(1000):
        watch.throttle.failed(v4("192.0.2.1"))
    assert watch.waits(v4("192.0.2.1")) == "429 rate_limit_exceeded 20"


def test_a_network_of_ipv6_waits_as_one_and_its_neighbour_does_not() -> None:
    watch = Watch(3)
    for number in range(3):
        watch.throttle.failed(v6(f"2001:db8::{number}:1"))
    assert watch.waits(v6("2001:db8::ffff")) is not None
    assert watch.waits(v6("2001:db8:0:1::1")) is None
    assert watch.waits(v4("192.0.2.1")) is None


def test_a_unix_socket_never_waits() -> None:
    watch = Watch(1)
    for _ in range(100):
        watch.throttle.failed(UNIXAddress(None))
    assert watch.waits(UNIXAddress(None)) is None


def test_a_flood_from_everywhere_takes_no_more_memory_than_its_bound() -> None:
    watch = Watch(1)
    for number in range(2 * MOST_BUCKETS):
        watch.throttle.failed(v6(f"2001:db8:{number >> 8:x}:{number & 255:x}::1"))
    assert len(watch.throttle._failures) == MOST_BUCKETS
