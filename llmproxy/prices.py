"""What requests cost: the price list, and amounts of money. Pure.

Prices are whole micro-units (1e-6) of a currency for a million of a kind, so a count times a price
is a whole number of pico-units (1e-12): sums are exact, and only what is shown is rounded.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable
from datetime import UTC, datetime

from llmproxy.config import PriceEntry, Prices
from llmproxy.model import Counts, Price

#: Pico-units in a micro-unit.
PICO = 10**6
_EVER = datetime.min.replace(tzinfo=UTC)


class PriceList:
    """The prices of a configuration, found by model and time."""

    def __init__(self, settings: Prices) -> None:
        self._since: dict[str, list[datetime]] = {}
        self._prices: dict[str, list[Price]] = {}
        for model, entries in settings.models.items():
            ordered = sorted(entries, key=_start)
            self._since[model] = [_start(entry) for entry in ordered]
            self._prices[model] = [_price(settings.currency, entry) for entry in ordered]

    def all(self) -> Iterable[Price]:
        """Every price, each once."""
        return {price for prices in self._prices.values() for price in prices}

    def at(self, model: str, moment: datetime) -> Price | None:
        """The price of a request that is opened at `moment`; None if there is none then."""
        since = self._since.get(model)
        if since is None:
            return None
        position = bisect_right(since, moment)
        return self._prices[model][position - 1] if position else None


def _start(entry: PriceEntry) -> datetime:
    return entry.valid_from or _EVER


def _price(currency: str, entry: PriceEntry) -> Price:
    amounts = (entry.prompt, entry.completion, entry.embedding, entry.transcription)
    text = "/".join((currency, *map(str, amounts)))
    identity = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1  # SQLite's have 63
    return Price(identity, currency, *amounts)


def cost(counts: Counts, price: Price) -> int:
    """What `counts` cost, in pico-units."""
    return sum(count * int(getattr(price, kind)) for kind, count in counts.items())


def shown(pico: int) -> str:
    """An amount in whole units and micro-units, rounded up: 1.000001 for one pico-unit over 1."""
    micro = -(-pico // PICO)
    return f"{micro // PICO}.{micro % PICO:06}"
