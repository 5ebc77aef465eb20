"""Keys: how they are spelled, how long what is known of them is believed, and when nothing is."""

from __future__ import annotations

import gc
import hashlib
import io
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from llmproxy import auth
from llmproxy.auth import LOOKUP_TIMEOUT_S, Authenticator, key_of
from llmproxy.endpoints import Dialect
from llmproxy.errors import InvalidKey, StorageError, Unavailable
from llmproxy.framing import Fields, combined
from llmproxy.model import Account
from llmproxy.storage import IAccounts

KEY = b"a-key-of-ours"
ALICE = Account("id-alice")
START = 1_700_000_000.0


def hashed(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


@implementer(IAccounts)
class FakeAccounts:
    """Keys in a dict. `down`: look-ups fail. `held`: they wait until the test answers them."""

    def __init__(self, **accounts: Account) -> None:
        self.accounts = dict(accounts)
        self.asked: list[str] = []
        self.down = False
        self.silent = False
        self.held: list[Deferred[Account | None]] = []

    def add(self, key: bytes, account: Account) -> None:
        self.accounts[hashed(key)] = account

    def find(self, secret_hash: str, now: datetime) -> Deferred[Account | None]:
        self.asked.append(secret_hash)
        if self.silent:
            self.held.append(Deferred())
            return self.held[-1]
        if self.down:
            return fail(StorageError("the store is down"))
        account = self.accounts.get(secret_hash)
        if account and account.expires and account.expires <= now:
            account = None
        return succeed(account)


class Gate:
    """An authenticator with its clock and its store; `now` is what it takes for the time."""

    def __init__(self, *, fresh_s: float = 1.0, stale_max_s: float = 300.0) -> None:
        self.clock = Clock()
        self.clock.advance(START)
        self.accounts = FakeAccounts()
        self.accounts.add(KEY, ALICE)
        self.authenticator = Authenticator(
            self.accounts, self.clock, fresh_s=fresh_s, stale_max_s=stale_max_s
        )

    def ask(self, key: bytes = KEY) -> Deferred[Account]:
        return Deferred.fromCoroutine(self.authenticator.authenticate(key))

    def verdict(self, key: bytes = KEY) -> Any:
        """The account, or the class of the refusal, of a question that is answered at once."""
        answer = self.ask(key)
        assert answer.called, "there is no answer yet"
        return outcome(answer)


def outcome(answer: Deferred[Account]) -> Any:
    found: list[Any] = []
    answer.addBoth(found.append)
    (result,) = found
    return type(result.value) if isinstance(result, Failure) else result


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    use_clock(gate, monkeypatch)
    return gate


def use_clock(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day follows the clock."""
    monkeypatch.setattr(auth, "utcnow", lambda: datetime.fromtimestamp(gate.clock.seconds(), UTC))


# -- how long it is believed -------------------------------------------------------------------


def test_the_fake_is_what_the_store_is() -> None:
    verifyObject(IAccounts, FakeAccounts())


def test_a_key_is_known_for_as_long_as_it_is_believed(gate: Gate) -> None:
    assert gate.authenticator.known(KEY) is None
    gate.verdict()
    assert gate.authenticator.known(KEY) == ALICE
    gate.clock.advance(0.99)
    assert gate.authenticator.known(KEY) == ALICE
    gate.clock.advance(0.01)
    assert gate.authenticator.known(KEY) is None
    assert len(gate.accounts.asked) == 1


def test_a_key_that_was_not_found_is_not_known(gate: Gate) -> None:
    assert gate.verdict(b"wrong") is InvalidKey
    assert gate.authenticator.known(b"wrong") is None


def test_a_key_is_known_until_it_expires_and_no_longer(gate: Gate) -> None:
    ends = datetime.fromtimestamp(START + 0.5, UTC)
    gate.accounts.add(KEY, Account("id-alice", expires=ends))
    gate.verdict()
    gate.clock.advance(0.4)
    assert gate.authenticator.known(KEY) is not None
    gate.clock.advance(0.1)
    assert gate.authenticator.known(KEY) is None
    assert gate.verdict() is InvalidKey


def test_a_key_is_not_known_when_the_clock_was_set_back(gate: Gate) -> None:
    gate.verdict()
    gate.clock.rightNow -= 10
    assert gate.authenticator.known(KEY) is None


def test_a_key_is_looked_up_once_a_second(gate: Gate) -> None:
    for _ in range(100):
        assert gate.verdict() == ALICE
    assert len(gate.accounts.asked) == 1
    gate.clock.advance(0.99)
    gate.verdict()
    assert len(gate.accounts.asked) == 1
    gate.clock.advance(0.01)
    gate.verdict()
    assert len(gate.accounts.asked) == 2


def test_the_store_is_asked_for_the_hash_and_never_for_the_key(gate: Gate) -> None:
    gate.verdict()
    assert gate.accounts.asked == [hashed(KEY)]


def test_a_revoked_key_is_refused_within_a_second(gate: Gate) -> None:
    assert gate.verdict() == ALICE
    gate.accounts.accounts.clear()
    gate.clock.advance(1.0)
    assert gate.verdict() is InvalidKey


def test_a_revoked_key_stays_refused_when_the_store_goes_down(gate: Gate) -> None:
    gate.verdict()
    gate.accounts.accounts.clear()
    gate.clock.advance(1.0)
    gate.verdict()
    gate.clock.advance(1.0)
    gate.accounts.down = True
    assert gate.verdict() is Unavailable


def test_a_new_key_works_within_a_second_of_a_wrong_try(gate: Gate) -> None:
    assert gate.verdict(b"new") is InvalidKey
    gate.accounts.add(b"new", Account("id-new"))
    assert gate.verdict(b"new") is InvalidKey
    gate.clock.advance(1.0)
    assert gate.verdict(b"new") == Account("id-new")


def test_the_age_of_an_answer_counts_from_its_question(gate: Gate) -> None:
    gate.accounts.silent = True
    slow = gate.ask()
    gate.clock.advance(0.9)
    gate.accounts.held[0].callback(ALICE)
    assert outcome(slow) == ALICE
    gate.accounts.silent = False
    gate.accounts.accounts.clear()
    gate.clock.advance(0.1)
    assert gate.verdict() is InvalidKey


def test_a_cached_key_ends_at_its_very_moment(gate: Gate) -> None:
    ends = datetime.fromtimestamp(START, UTC) + timedelta(seconds=0.5)
    gate.accounts.add(KEY, Account("id-alice", expires=ends))
    assert gate.verdict() == Account("id-alice", expires=ends)
    gate.clock.advance(0.499)
    assert gate.verdict() == Account("id-alice", expires=ends)
    gate.clock.advance(0.001)
    assert gate.verdict() is InvalidKey


def test_a_key_ends_at_its_moment_while_the_store_is_down(gate: Gate) -> None:
    ends = datetime.fromtimestamp(START, UTC) + timedelta(seconds=60)
    gate.accounts.add(KEY, Account("id-alice", expires=ends))
    gate.verdict()
    gate.accounts.down = True
    gate.clock.advance(59)
    assert gate.verdict() == Account("id-alice", expires=ends)
    gate.clock.advance(1)
    assert gate.verdict() is InvalidKey


@pytest.mark.parametrize("step_s", [-86_400, 86_400])
def test_a_clock_that_is_set_leaves_nobody_in_for_long(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, step_s: int
) -> None:
    gate.verdict()
    gate.accounts.accounts.clear()
    gate.clock.rightNow += step_s
    assert gate.verdict() is InvalidKey


def test_a_clock_that_is_set_back_does_not_keep_the_store_unasked(gate: Gate) -> None:
    gate.accounts.down = True
    assert gate.verdict() is Unavailable
    gate.accounts.down = False
    gate.clock.rightNow -= 86_400
    assert gate.verdict() == ALICE


# -- the store is down -------------------------------------------------------------------------


@pytest.mark.parametrize("stale_max_s", [300.0, 5.0, 1.5])
def test_a_known_key_works_while_the_store_is_down_up_to_the_bound(
    monkeypatch: pytest.MonkeyPatch, stale_max_s: float
) -> None:
    gate = Gate(stale_max_s=stale_max_s)
    use_clock(gate, monkeypatch)
    gate.verdict()
    gate.accounts.down = True
    gate.clock.advance(1.0)
    assert gate.verdict() == ALICE
    gate.clock.advance(stale_max_s - 1.01)
    assert gate.verdict() == ALICE
    gate.clock.advance(0.01)
    assert gate.verdict() is Unavailable


def test_a_bound_of_zero_trusts_no_key_while_the_store_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(stale_max_s=0.0)
    use_clock(gate, monkeypatch)
    gate.verdict()
    gate.accounts.down = True
    gate.clock.advance(1.0)
    assert gate.verdict() is Unavailable


def test_using_a_key_in_an_outage_does_not_extend_its_bound(gate: Gate) -> None:
    gate.verdict()
    gate.accounts.down = True
    for _ in range(299):
        gate.clock.advance(1.0)
        assert gate.verdict() == ALICE
    gate.clock.advance(1.0)
    assert gate.verdict() is Unavailable


def test_an_unknown_key_is_not_a_wrong_key_while_the_store_is_down(gate: Gate) -> None:
    gate.accounts.down = True
    assert gate.verdict() is Unavailable
    assert gate.verdict(b"never seen") is Unavailable


def test_a_client_is_told_when_to_come_back(gate: Gate) -> None:
    gate.accounts.down = True
    refused: list[Failure] = []
    gate.ask().addErrback(refused.append)
    error = refused[0].value
    assert isinstance(error, Unavailable)
    assert (error.status, error.headers) == (503, {"Retry-After": "2"})


def test_a_store_that_does_not_answer_is_given_up_within_two_seconds(gate: Gate) -> None:
    assert LOOKUP_TIMEOUT_S < 2
    gate.accounts.silent = True
    unknown = gate.ask()
    gate.clock.advance(LOOKUP_TIMEOUT_S - 0.01)
    assert not unknown.called
    gate.clock.advance(0.01)
    assert outcome(unknown) is Unavailable


def test_a_known_key_works_when_the_store_does_not_answer(gate: Gate) -> None:
    gate.verdict()
    gate.accounts.silent = True
    gate.clock.advance(1.0)
    known = gate.ask()
    gate.clock.advance(LOOKUP_TIMEOUT_S)
    assert outcome(known) == ALICE


def test_a_store_that_is_down_is_asked_once_a_second(gate: Gate) -> None:
    gate.accounts.silent = True
    first = gate.ask()
    gate.clock.advance(LOOKUP_TIMEOUT_S)
    assert outcome(first) is Unavailable
    for number in range(100):
        assert gate.verdict(b"key %d" % number) is Unavailable
    assert len(gate.accounts.asked) == 1
    gate.clock.advance(1.0)
    again = gate.ask()
    assert len(gate.accounts.asked) == 2
    gate.clock.advance(LOOKUP_TIMEOUT_S)
    assert outcome(again) is Unavailable


def test_keys_are_known_again_when_the_store_is_back(gate: Gate) -> None:
    gate.accounts.down = True
    assert gate.verdict() is Unavailable
    assert not gate.authenticator.store_is_up
    gate.accounts.down = False
    gate.clock.advance(1.0)
    assert gate.verdict() == ALICE
    assert gate.authenticator.store_is_up


def test_an_error_that_nobody_thought_of_lets_nobody_in(
    gate: Gate, flush_logged_errors: Any
) -> None:
    gate.accounts.find = lambda *a: fail(ZeroDivisionError())  # type: ignore[method-assign]
    assert gate.verdict() is Unavailable
    assert len(flush_logged_errors(ZeroDivisionError)) == 1


def test_a_look_up_that_raises_lets_nobody_in_and_nobody_wait(
    gate: Gate, flush_logged_errors: Any
) -> None:
    def raise_it(*args: object) -> Any:
        raise ZeroDivisionError

    gate.accounts.find = raise_it  # type: ignore[method-assign, assignment]
    assert gate.verdict() is Unavailable
    assert gate.verdict() is Unavailable
    flush_logged_errors(ZeroDivisionError)


# -- many at once ------------------------------------------------------------------------------


def test_a_key_is_looked_up_once_for_all_that_wait_for_it(gate: Gate) -> None:
    gate.accounts.silent = True
    waiting = [gate.ask() for _ in range(50)]
    assert len(gate.accounts.asked) == 1
    gate.accounts.held[0].callback(ALICE)
    assert [outcome(each) for each in waiting] == [ALICE] * 50


def test_all_that_wait_for_a_look_up_hear_of_its_failure(gate: Gate) -> None:
    gate.accounts.silent = True
    waiting = [gate.ask() for _ in range(50)]
    gate.clock.advance(LOOKUP_TIMEOUT_S)
    assert [outcome(each) for each in waiting] == [Unavailable] * 50
    assert len(gate.accounts.asked) == 1


def test_different_keys_are_looked_up_side_by_side(gate: Gate) -> None:
    gate.accounts.silent = True
    one, two = gate.ask(b"one"), gate.ask(b"two")
    assert gate.accounts.asked == [hashed(b"one"), hashed(b"two")]
    gate.accounts.held[1].callback(ALICE)
    assert not one.called
    assert outcome(two) == ALICE
    gate.accounts.held[0].callback(None)
    assert outcome(one) is InvalidKey


def test_wrong_keys_are_remembered_for_a_second(gate: Gate) -> None:
    for _ in range(100):
        assert gate.verdict(b"wrong") is InvalidKey
    assert len(gate.accounts.asked) == 1
    gate.clock.advance(1.0)
    gate.verdict(b"wrong")
    assert len(gate.accounts.asked) == 2


def test_a_flood_of_guesses_does_not_grow_the_memory(gate: Gate) -> None:
    def guess(numbers: range) -> None:
        for number in numbers:
            assert gate.verdict(b"guess %d" % number) is InvalidKey

    gate.accounts.find = lambda *a: succeed(None)  # type: ignore[method-assign]
    guess(range(auth.CACHE_SIZE))
    gc.collect()
    before = sys.getallocatedblocks()
    guess(range(auth.CACHE_SIZE, 100_000))
    gc.collect()
    assert sys.getallocatedblocks() - before < auth.CACHE_SIZE


def test_a_flood_while_the_store_is_silent_leaves_nothing_behind(gate: Gate) -> None:
    gate.accounts.silent = True
    waiting = [gate.ask(b"guess %d" % number) for number in range(2000)]
    gate.clock.advance(LOOKUP_TIMEOUT_S)
    assert {outcome(each) for each in waiting} == {Unavailable}
    assert gate.authenticator._asking == {}
    assert not gate.authenticator._found
    assert not gate.authenticator._missing


def test_a_flood_of_guesses_does_not_drive_out_the_keys_that_are_known(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_SIZE", 10)
    gate.verdict()
    for number in range(100):
        gate.verdict(b"guess %d" % number)
    gate.accounts.down = True
    gate.clock.advance(1.0)
    assert gate.verdict() == ALICE


def test_no_more_keys_are_remembered_than_the_bound(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_SIZE", 10)
    for number in range(11):
        gate.accounts.add(b"key %d" % number, Account(f"id-{number}"))
        gate.verdict(b"key %d" % number)
    gate.accounts.down = True
    gate.clock.advance(1.0)
    verdicts = [gate.verdict(b"key %d" % number) for number in range(11)]
    assert verdicts == [Unavailable, *(Account(f"id-{number}") for number in range(1, 11))]


# -- what is said of it ------------------------------------------------------------------------


def test_no_key_is_in_a_log_an_error_or_a_repr(gate: Gate, logged: list[str]) -> None:
    secret = b"super-secret-key-0123456789"
    gate.accounts.add(secret, ALICE)
    said = io.StringIO()
    for down in (False, True, False):
        gate.accounts.down = down
        for key in (secret, secret + b"-unknown"):
            refused: list[Any] = []
            gate.ask(key).addErrback(refused.append)
            for failure in refused:
                print(failure, repr(failure.value), failure.value.__dict__, file=said)
                print(failure.getTraceback(detail="default"), file=said)
        gate.clock.advance(1.0)
    print(repr(gate.authenticator), vars(gate.authenticator), repr(ALICE), file=said)
    everything = said.getvalue() + "\n".join(logged)
    assert "does not answer" in everything
    assert "secret-key" not in everything


def test_no_key_is_in_the_log_of_an_unexpected_error(
    gate: Gate, logged: list[str], flush_logged_errors: Any
) -> None:
    secret = b"super-secret-key-0123456789"
    gate.accounts.find = lambda *a: fail(ZeroDivisionError())  # type: ignore[method-assign]
    gate.verdict(secret)
    (failure,) = flush_logged_errors(ZeroDivisionError)
    everything = failure.getTraceback(detail="verbose") + "\n".join(logged)
    assert "ZeroDivisionError" in everything
    assert "secret-key" not in everything


# -- how it is spelled -------------------------------------------------------------------------

ODD = [
    [],
    [b""],
    [b" "],
    [b"Bearer"],
    [b"Bearer "],
    [b"Bearer  "],
    [b"Bearer  token2"],
    [b"Bearer token2 "],
    [b" Bearer token2"],
    [b"Bearer\ttoken2"],
    [b"Bearer\x0btoken2"],
    [b"Bearer\xa0token2"],
    [b"Bearer token2\t"],
    [b"Bearer token2\x00"],
    [b"Bearer \x00token2"],
    [b"Bearer token2\x7f"],
    [b"Bearer tok en2"],
    [b"Bearer token2\x80"],
    [b"Bearer tok\xc3\xa9n2"],
    [b"Bearer \xff\xfe"],
    [b"Bearertoken2"],
    [b"Bearer:token2"],
    [b"Bearer=token2"],
    [b"Bearer, token2 x"],
    [b"Bearer token2, Bearer token3"],
    [b"Bearer Bearer token2"],
    [b"token2"],
    [b"token token2"],
    [b"Token token2"],
    [b"Basic dG9rZW4yOg=="],
    [b"Digest username=token2"],
    [b"Negotiate token2"],
    [b"Bearer2 token2"],
    [b"earer token2"],
    [b"\xef\xbb\xbfBearer token2"],
    ["\uff22earer token2".encode()],
    ["Bearer t\u043eken2".encode()],
    [b"Bearer token2", b"Bearer token2"],
    [b"Bearer token2", b"Bearer token3"],
    [b"", b"Bearer token2"],
    [b"Bearer token2", b""],
    [b"Bearer " + b"x" * 513],
    [b"Bearer " + b"x" * 100_000],
    [b"Bearer\r\n token2"],
]


def sent(authorization: list[bytes], x_api_key: list[bytes]) -> Fields:
    """As `framing.combined` has them, but for the space around one."""
    named = ((b"authorization", authorization), (b"x-api-key", x_api_key))
    return {
        name: values[0] if len(values) == 1 else combined([(name, each) for each in values])[name]
        for name, values in named
        if values
    }


@pytest.mark.parametrize("authorization", ODD, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_an_odd_authorization_is_no_key(authorization: list[bytes], dialect: Dialect) -> None:
    with pytest.raises(InvalidKey) as refused:
        key_of(sent(authorization, []), dialect)
    assert refused.value.status == 401
    assert refused.value.headers == {"WWW-Authenticate": "Bearer"}
    assert "token" not in str(refused.value)


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER", b"bEaReR"])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_the_scheme_s_name_has_no_case(scheme: bytes, dialect: Dialect) -> None:
    assert key_of(sent([scheme + b" token2"], []), dialect) == b"token2"


def test_a_key_may_have_every_visible_character_and_512_of_them() -> None:
    visible = bytes(range(33, 127))
    assert key_of(sent([b"Bearer " + visible], []), Dialect.OPENAI) == visible
    assert key_of(sent([b"Bearer " + b"x" * 512], []), Dialect.OPENAI) == b"x" * 512


def test_x_api_key_is_a_key_in_anthropic_s_dialect_only() -> None:
    assert key_of(sent([], [b"token2"]), Dialect.ANTHROPIC) == b"token2"
    with pytest.raises(InvalidKey):
        key_of(sent([], [b"token2"]), Dialect.OPENAI)


@pytest.mark.parametrize(
    "x_api_key", [[b""], [b" "], [b"a b"], [b"x\x00"], [b"x" * 513], [b"token2", b"token2"]]
)
def test_an_odd_x_api_key_is_no_key(x_api_key: list[bytes]) -> None:
    with pytest.raises(InvalidKey):
        key_of(sent([], x_api_key), Dialect.ANTHROPIC)


@pytest.mark.parametrize("other", [b"token2", b"token3", b""])
def test_an_authorization_goes_before_x_api_key(other: bytes) -> None:
    assert key_of(sent([b"Bearer token2"], [other]), Dialect.ANTHROPIC) == b"token2"
    with pytest.raises(InvalidKey):
        key_of(sent([b"Basic x"], [b"token2"]), Dialect.ANTHROPIC)
