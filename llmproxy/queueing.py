"""Waiting for a model that has as much to do as it may: in turns, so that no key holds up others.

enter_at_once --yes--> served --> leave --> the next one of the next key that waits
    \\-no--> wait -----> served
               \\-----> TooManyRequests: nobody left in time, or too many wait already
"""

from __future__ import annotations

from collections import OrderedDict, deque

from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from llmproxy.errors import TooManyRequests

#: What clients are told to wait when they could not be let in.
TRY_AGAIN_S = 5.0


class FairQueue:
    """At most `most` are served at once (None: any number), `size` wait, and each for `timeout_s`.

    The keys that wait take turns: of each one is let in, then one of the next.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self.most: int | None = None
        self.size = 0
        self.timeout_s = 0.0
        self.served = 0
        self.waiting = 0
        self._clock = clock
        self._waiters: OrderedDict[str, deque[Deferred[None]]] = OrderedDict()

    def enter_at_once(self) -> bool:
        """Whether there was a place; then `leave` must follow."""
        if self.most is not None and (self.served >= self.most or self.waiting):
            return False
        self.served += 1
        return True

    def wait(self, key_id: str) -> Deferred[None]:
        """Fires when there is a place; then `leave` must follow. It may be cancelled before that.

        Fails with TooManyRequests, which this also raises at once.
        """
        if self.waiting >= self.size:
            raise _busy()
        turn: Deferred[None] = Deferred(lambda turn: self._forget(key_id, turn))
        self._waiters.setdefault(key_id, deque()).append(turn)
        self.waiting += 1
        turn.addTimeout(self.timeout_s, self._clock)
        turn.addErrback(_refuse_late)
        return turn

    def leave(self) -> None:
        """One that was served has ended."""
        self.served -= 1
        self.let_in()

    def let_in(self) -> None:
        """Let in as many as there are places for, when there may be more than before."""
        while self._waiters and (self.most is None or self.served < self.most):
            key_id, turns = self._waiters.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiters[key_id] = turns  # at the end
            self.waiting -= 1
            self.served += 1
            turn.callback(None)

    def _forget(self, key_id: str, turn: Deferred[None]) -> None:
        turns = self._waiters[key_id]
        turns.remove(turn)
        if not turns:
            del self._waiters[key_id]
        self.waiting -= 1


def _busy() -> TooManyRequests:
    return TooManyRequests("The model has too much to do; try again.", wait_s=TRY_AGAIN_S)


def _refuse_late(failure: Failure) -> None:
    failure.trap(DeferTimeoutError)
    raise _busy()
