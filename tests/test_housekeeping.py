"""The housekeeping fixtures: each kind of leftover fails exactly the test that left it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

GUILTY = {
    "test_leaves_a_delayed_call": "pending delayed call",
    "test_leaves_a_port": "open in the reactor",
    "test_leaves_a_connection": "open in the reactor",
    "test_logs_a_failure": "ZeroDivisionError",
    "test_logs_a_critical_event": "the roof is on fire",
    "test_drops_a_failed_deferred": "ValueError: nobody waits",
    "test_drops_a_failed_deferred_in_a_cycle": "ValueError: nobody waits",
    "test_claims_another_error": "ZeroDivisionError",
    "test_never_awaits_a_coroutine": "was never awaited",
    "test_leaves_a_file_open": "unclosed file",
    "test_hangs": "the test was not done after 0.5 s",
}

INNOCENT = {
    "test_after_a_delayed_call",
    "test_after_a_port",
    "test_claims_its_error",
    "test_claims_a_dropped_failure",
    "test_closes_at_the_last_moment",
    "test_uses_a_thread",
    "test_uses_a_connection_of_the_module",
    "test_logs_a_warning",
    "test_after_all",
}

SAMPLE = """
import gc
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ClientFactory, Factory, Protocol
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

log = Logger()


class Echo(Factory):
    protocol = Protocol


def listen():
    return reactor.listenTCP(0, Echo(), interface="127.0.0.1")


def connect(port):
    opened = Deferred()

    class Opened(Protocol):
        def connectionMade(self):
            opened.callback(self)

    class Factory(ClientFactory):
        protocol = Opened

    reactor.connectTCP("127.0.0.1", port.getHost().port, Factory())
    return opened


@pytest_twisted.async_yield_fixture(scope="module")
async def kept():
    port = listen()
    connection = await connect(port)
    yield connection
    connection.transport.loseConnection()
    await port.stopListening()


def test_leaves_a_delayed_call():
    reactor.callLater(3600, print)


def test_after_a_delayed_call():
    pass


def test_leaves_a_port():
    listen()


def test_after_a_port():
    pass


@pytest_twisted.ensureDeferred
async def test_leaves_a_connection():
    port = listen()
    await connect(port)
    await port.stopListening()


def test_logs_a_failure():
    try:
        1 / 0
    except ZeroDivisionError:
        log.failure("it went wrong")


def test_logs_a_critical_event():
    log.critical("the roof is on {what}", what="fire")


def test_drops_a_failed_deferred():
    Deferred().errback(ValueError("nobody waits"))


@pytest_twisted.ensureDeferred
async def test_drops_a_failed_deferred_in_a_cycle():
    dropped = Deferred()
    dropped.itself = dropped
    dropped.errback(ValueError("nobody waits"))


def test_claims_another_error(flush_logged_errors):
    test_logs_a_failure()
    assert flush_logged_errors(KeyError) == []


def test_claims_its_error(flush_logged_errors):
    test_logs_a_failure()
    [failure] = flush_logged_errors(ZeroDivisionError)
    assert failure.check(ZeroDivisionError)


def test_claims_a_dropped_failure(flush_logged_errors):
    dropped = Deferred()
    dropped.itself = dropped
    dropped.errback(ValueError("nobody waits"))
    del dropped
    assert len(flush_logged_errors(ValueError)) == 1


@pytest_twisted.ensureDeferred
async def test_closes_at_the_last_moment():
    port = listen()
    connection = await connect(port)
    connection.transport.loseConnection()
    port.stopListening()
    reactor.callLater(0.05, int)


@pytest_twisted.ensureDeferred
async def test_uses_a_thread():
    assert await deferToThread(int, "1") == 1


def test_uses_a_connection_of_the_module(kept):
    kept.transport.write(b"hello")


def test_never_awaits_a_coroutine():
    async def never():
        pass

    never()


def test_leaves_a_file_open():
    open(__file__)


@pytest.mark.timeout(1)
@pytest_twisted.ensureDeferred
async def test_hangs():
    await Deferred()


def test_logs_a_warning():
    log.warn("not an error")


def test_after_all():
    pass
"""

SETTINGS = """
[pytest]
pythonpath = {tests}
filterwarnings = error
timeout = 30
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For each test of the sample, what pytest said about it; nothing if it passed."""
    folder = tmp_path_factory.mktemp("sample")
    tests = Path(__file__).parent
    (folder / "pytest.ini").write_text(SETTINGS.format(tests=tests))
    (folder / "conftest.py").write_text('pytest_plugins = ("housekeeping",)\n')
    (folder / "test_sample.py").write_text(SAMPLE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert (folder / "report").exists(), run.stdout + run.stderr
    said: dict[str, str] = {}
    for case in ElementTree.parse(folder / "report").iter("testcase"):
        # A test whose end fails is in the report twice: as passed, and as an error.
        texts = [element.text or "" for element in case if element.tag in ("failure", "error")]
        said[case.attrib["name"]] = said.get(case.attrib["name"], "") + "".join(texts)
    return said


@pytest.mark.parametrize("name", GUILTY)
def test_a_leftover_fails_its_test(complaints: dict[str, str], name: str):
    assert GUILTY[name] in complaints[name]


@pytest.mark.parametrize("name", sorted(INNOCENT))
def test_a_clean_test_passes(complaints: dict[str, str], name: str):
    assert complaints[name] == ""


def test_the_sample_has_no_other_tests(complaints: dict[str, str]):
    assert complaints.keys() == GUILTY.keys() | INNOCENT


def test_a_clock_stands_still(clock):
    called: list[bool] = []
    clock.callLater(5, called.append, True)
    clock.advance(4.9)
    assert called == []
    clock.advance(0.1)
    assert called == [True]
