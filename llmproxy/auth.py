"""Keys: from a request's headers to an account, past a bounded cache.

A known key is trusted for `fresh_s` after a look-up, so that its revocation is seen within that
time. While the store is down it is trusted for `stale_max_s`. A key that was not found is
remembered for `fresh_s` too, so that a flood of guesses does not become a flood of queries, and
it counts for the address it came from (see `throttle.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger

from llmproxy.endpoints import Dialect
from llmproxy.errors import InvalidKey, StorageError, Unavailable
from llmproxy.framing import Fields
from llmproxy.model import Account, utcnow
from llmproxy.storage import IAccounts
from llmproxy.throttle import Throttle

#: Longest key that is looked at; longer ones can't be ours.
MAX_KEY_BYTES = 512
_TOKEN = re.compile(rb"[!-~]{1,%d}" % MAX_KEY_BYTES)
# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_ANTHROPIC = Dialect.ANTHROPIC
#: How long one look-up may take.
LOOKUP_TIMEOUT_S = 1.5
#: How many keys are remembered, found and not found each.
CACHE_SIZE = 10_000


def key_of(fields: Fields, dialect: Dialect) -> bytes:
    """The key that a request carries: exactly one, spelled exactly. Raises InvalidKey.

    `Authorization: Bearer KEY` (RFC 6750 section 2.1); where `dialect` is Anthropic's, `x-api-key:
    KEY` also. Two of a kind have become a value with a space, which is no key.
    """
    if dialect is _ANTHROPIC and b"authorization" not in fields:
        key = fields.get(b"x-api-key", b"")
    else:
        scheme, _, key = fields.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            raise InvalidKey
    if not _TOKEN.fullmatch(key):
        raise InvalidKey
    return key


@dataclass(slots=True)
class _Known:
    account: Account | None
    asked_at: float


class _Cache(OrderedDict[str, _Known]):
    """The last `CACHE_SIZE` look-ups."""

    def remember(self, secret_hash: str, known: _Known) -> None:
        self.pop(secret_hash, None)
        self[secret_hash] = known
        if len(self) > CACHE_SIZE:
            self.popitem(last=False)


def _valid(account: Account | None) -> Account | None:
    if account is None or account.expires is None or account.expires > utcnow():
        return account
    return None


class Authenticator:
    """From a key to its account; one look-up at a time per key. `throttle`: for failed keys."""

    log = Logger()

    def __init__(
        self,
        accounts: IAccounts,
        clock: IReactorTime,
        *,
        fresh_s: float,
        stale_max_s: float,
        throttle: Throttle | None = None,
    ) -> None:
        self._accounts = accounts
        self._throttle = throttle
        self._clock = clock
        self._fresh_s = fresh_s
        self._stale_max_s = stale_max_s
        self._found = _Cache()
        self._missing = _Cache()
        self._asking: dict[str, list[Deferred[_Known | Unavailable]]] = {}
        self._down_since: float | None = None
        self._failed_at = 0.0

    @property
    def store_is_up(self) -> bool:
        """False while the last look-up failed."""
        return self._down_since is None

    def known(self, key: bytes) -> Account | None:
        """What `authenticate` would give, if it need not ask; None for any other key.

        So it is for nearly all requests, and they need no coroutine for it.
        """
        known = self._fresh(hashlib.sha256(key).hexdigest())
        return _valid(known.account) if known else None

    async def authenticate(self, key: bytes, peer: IAddress | None = None) -> Account:
        """The account that `key`, which came from `peer`, belongs to.

        Raises InvalidKey, TooManyRequests, Unavailable.
        """
        secret_hash = hashlib.sha256(key).hexdigest()
        known = self._fresh(secret_hash) or await self._ask(secret_hash, peer)
        if isinstance(known, Unavailable):
            raise known
        account = _valid(known.account)
        if account is None:
            raise InvalidKey
        return account

    def _fresh(self, secret_hash: str) -> _Known | None:
        known = self._found.get(secret_hash) or self._missing.get(secret_hash)
        if known and self._is_within(self._fresh_s, known.asked_at):
            return known
        return None

    def _is_within(self, seconds: float, since: float) -> bool:
        """False too if the clock was set back, as that of other reactors than ours can be: then
        nobody knows how long it has been."""
        return 0 <= self._clock.seconds() - since < seconds

    async def _ask(self, secret_hash: str, peer: IAddress | None) -> _Known | Unavailable:
        """Look the key up, or share the look-up that runs for it."""
        if secret_hash in self._asking:
            turn: Deferred[_Known | Unavailable] = Deferred()
            self._asking[secret_hash].append(turn)
            return await turn
        if not self.store_is_up and self._is_within(self._fresh_s, self._failed_at):
            return self._stale(secret_hash)
        if self._throttle is not None and secret_hash not in self._found:
            self._throttle.check(peer)
        self._asking[secret_hash] = []
        known = await self._look_up(secret_hash)
        if self._throttle is not None and isinstance(known, _Known) and known.account is None:
            self._throttle.failed(peer)
        for turn in self._asking.pop(secret_hash):
            turn.callback(known)
        return known

    async def _look_up(self, secret_hash: str) -> _Known | Unavailable:
        asked_at = self._clock.seconds()
        try:
            found = self._accounts.find(secret_hash, utcnow())
            account = await found.addTimeout(LOOKUP_TIMEOUT_S, self._clock)
        except (StorageError, DeferTimeoutError) as error:
            self._went_down(error)
            return self._stale(secret_hash)
        except Exception as error:  # a fault of ours must not let anybody in, nor hang the waiters
            self.log.failure("key look-up")
            self._went_down(error)
            return self._stale(secret_hash)
        self._came_up()
        known = _Known(account, asked_at)
        (self._found if account else self._missing).remember(secret_hash, known)
        (self._missing if account else self._found).pop(secret_hash, None)
        return known

    def _stale(self, secret_hash: str) -> _Known | Unavailable:
        """What the cache still allows while the store is down."""
        known = self._found.get(secret_hash)
        if known and self._is_within(self._stale_max_s, known.asked_at):
            return known
        return Unavailable("API keys can't be checked right now; try again shortly.")

    def _went_down(self, error: Exception) -> None:
        self._failed_at = self._clock.seconds()
        if self._down_since is None:
            self._down_since = self._failed_at
            self.log.error("keys: the store does not answer: {error}", error=error)

    def _came_up(self) -> None:
        if self._down_since is not None:
            seconds = self._clock.seconds() - self._down_since
            self._down_since = None
            self.log.info("keys: the store answers again after {seconds:.0f} s", seconds=seconds)
