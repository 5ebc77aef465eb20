"""What keys with a budget have used at several proxies, each of which has a journal of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twisted.internet.defer import Deferred
from zope.interface import implementer

from llmproxy.model import Counts, Spending
from llmproxy.storage import ISpending


@implementer(ISpending)
class SharedSpending:
    """See `ISpending`: what `own`, of this proxy's journal, says, and then the sum of all.

    `exchange`: see `mongo_limits.MongoSpending`. `journal`: the name of ours.
    """

    def __init__(
        self,
        own: ISpending,
        journal: str,
        exchange: Callable[[str, str, Spending], Deferred[Spending]],
    ) -> None:
        self._own = own
        self._journal = journal
        self._exchange = exchange

    def of(self, key_id: str, running: Mapping[str, Counts]) -> Deferred[Spending]:
        """See `ISpending.of`."""
        own = self._own.of(key_id, running)
        return own.addCallback(lambda mine: self._exchange(key_id, self._journal, mine))
