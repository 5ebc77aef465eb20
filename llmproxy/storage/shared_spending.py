"""What keys with a budget have used at several proxies, each of which has a journal of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.model import Amount, Counts, Spending
from llmproxy.storage import ISpending

#: How often the others are told of keys with requests in flight. Of a journal that is not heard of
#: for a minute they believe that it has none.
ROUND_S = 10.0
#: How long a stop takes at most to tell them the last.
LAST_ROUND_S = 1.0


@implementer(ISpending)
class SharedSpending(Service):
    """See `ISpending`: what `own`, of this proxy's journal, says, and then the sum of all.

    `exchange`: see `mongo_limits.MongoSpending`. `journal`: the name of ours. Others learn what
    requests in flight came to also if nobody asks for their key again.
    """

    log = Logger()

    def __init__(
        self,
        own: ISpending,
        journal: str,
        exchange: Callable[[str, str, Spending], Deferred[Spending]],
        clock: IReactorTime,
    ) -> None:
        self._own = own
        self._journal = journal
        self._exchange = exchange
        self._clock = clock
        self._told: dict[str, Spending | None] = {}  # of keys of which there may be news
        self._rounds: Deferred[None] | None = None

    def of(self, key_id: str, running: Mapping[str, Counts]) -> Deferred[Spending]:
        """See `ISpending.of`."""
        return Deferred.fromCoroutine(self._of(key_id, running))

    async def _of(self, key_id: str, running: Mapping[str, Counts]) -> Spending:
        self._told[key_id] = None  # who asks is about to send a request
        mine = await self._own.of(key_id, running)
        return await self._exchange(key_id, self._journal, mine)

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._rounds = Deferred.fromCoroutine(self._go_round())
        self._rounds.addErrback(self._ended)

    def stopService(self) -> Deferred[None]:
        """See IService. Fires when the others know the last, or can't be told."""
        super().stopService()
        if self._rounds is not None:
            self._rounds.cancel()
        last = Deferred.fromCoroutine(self._tell()).addTimeout(LAST_ROUND_S, self._clock)
        return last.addErrback(self._ended)

    async def _go_round(self) -> None:
        while True:
            await deferLater(self._clock, ROUND_S)
            await self._tell()

    async def _tell(self) -> None:
        """Tell the others, one key after the other: that is nobody's hurry."""
        for key_id in tuple(self._told):
            with contextlib.suppress(StorageError):  # the next round tells it
                mine = await self._own.of(key_id, {})
                await self._exchange(key_id, self._journal, mine)
                self._was_told(key_id, mine._replace(number=0))

    def _was_told(self, key_id: str, mine: Spending) -> None:
        if mine == self._told[key_id] and mine.held == Amount():
            del self._told[key_id]
        else:
            self._told[key_id] = mine

    def _ended(self, failure: Failure) -> None:
        if not failure.check(CancelledError, DeferTimeoutError):
            self.log.failure("what proxies tell each other of budgets", failure)
