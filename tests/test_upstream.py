"""The backend's side: failures as ours, URLs and headers as they are sent, and TLS."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from backend import JSON, Close, ScriptedBackend, Stall, json_answer, raw_answer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from deferreds import failure_of, result_of
from memory import Backend as MemoryBackend
from OpenSSL import SSL
from treq import content
from twisted.internet import error, ssl
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock, deferLater
from twisted.python.failure import Failure
from twisted.web._newclient import (
    RequestGenerationFailed,
    RequestTransmissionFailed,
    ResponseFailed,
    ResponseNeverReceived,
)
from twisted.web.http_headers import Headers
from twisted.web.iweb import IBodyProducer
from zope.interface.verify import verifyObject

from llmproxy.agent import BytesBody, CodedAnswer
from llmproxy.config import Backend
from llmproxy.errors import (
    BackendError,
    BackendTimeout,
    BadRequest,
    BodyTooLarge,
    ProxyError,
)
from llmproxy.headers import for_backend
from llmproxy.upload import ClientGone
from llmproxy.upstream import (
    NotSent,
    Upstream,
    connect,
    translate,
)

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor


# --- failures -----------------------------------------------------------------------------------


def nested(kind: Callable[[list[Failure]], Exception], inner: Exception) -> Exception:
    return kind([Failure(inner)])


TOO_LARGE, GONE = BodyTooLarge("too large"), ClientGone()
TABLE = [
    (error.ConnectionRefusedError(), NotSent),
    (error.ConnectError(), NotSent),
    (error.NoRouteError(), NotSent),
    (error.UnknownHostError(), NotSent),
    (error.TCPTimedOutError(), NotSent),
    (error.TimeoutError(), NotSent),  # a connection that was not made in time
    (error.ConnectingCancelledError(None), NotSent),
    (error.DNSLookupError(), NotSent),
    (CancelledError(), BackendTimeout),
    (error.ConnectionLost(), BackendError),
    (error.ConnectionDone(), BackendError),
    (error.ConnectionAborted(), BackendError),
    (nested(ResponseNeverReceived, error.ConnectionLost()), BackendError),
    (nested(ResponseNeverReceived, CancelledError()), BackendError),
    (nested(ResponseFailed, ValueError("canary")), BackendError),
    (nested(RequestTransmissionFailed, error.ConnectionLost()), BackendError),
    (nested(RequestGenerationFailed, error.ConnectionLost()), BackendError),
    (ValueError("canary"), BackendError),
]


@pytest.mark.parametrize(("failure", "expected"), TABLE, ids=lambda v: getattr(v, "__name__", None))
def test_a_failure_of_the_transport_becomes_ours_and_shows_nothing_of_itself(failure, expected):
    told = translate(failure)
    assert type(told) is expected
    assert "canary" not in str(told)


@pytest.mark.parametrize("ours", [TOO_LARGE, GONE, NotSent("x"), BadRequest("x")])
@pytest.mark.parametrize("kind", [None, RequestGenerationFailed, ResponseNeverReceived])
def test_our_own_failure_is_found_in_what_it_was_wrapped_in(ours, kind):
    assert translate(ours if kind is None else nested(kind, ours)) is ours


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotSent("x"), 502),
        (BackendTimeout("x"), 504),
        (BackendError("x"), 502),
        (CodedAnswer(), 502),
    ],
)
def test_a_failure_of_the_backend_has_a_gateways_status(error, status):
    assert isinstance(error, ProxyError)
    assert error.status == status


# --- requests -----------------------------------------------------------------------------------


def upstream(clock: Clock, url: str = "http://b:1") -> tuple[Upstream, MemoryBackend]:
    backend = MemoryBackend(clock, "/".join(url.split("/")[:3]).encode())
    settings = Backend(name="m", url=url, device="gpu")
    return Upstream(settings, backend.agent), backend


def test_a_body_is_a_body():
    assert verifyObject(IBodyProducer, BytesBody(b""))


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://b:1", b"POST /v1/chat/completions HTTP/1.1\r\n"),
        ("http://b:1/some%20where/x", b"POST /some%20where/x/v1/chat/completions HTTP/1.1\r\n"),
    ],
)
def test_a_path_is_put_after_the_backends_url(clock, url, line):
    up, backend = upstream(clock, url)
    sending = up.send("/v1/chat/completions", Headers(), BytesBody(b"{}"))
    assert backend.link.received.startswith(line)
    sending.addErrback(lambda _: None).cancel()


def test_a_body_says_when_it_is_sent_and_not_before(clock):
    up, backend = upstream(clock)
    body, sent = BytesBody(b"{}"), []
    body.on_sent = lambda: sent.append(backend.link.received.endswith(b"{}"))
    sending = up.send("/p", Headers(), body)
    assert sent == [True]
    sending.addErrback(lambda _: None).cancel()


@pytest.mark.parametrize("wish", [b"gzip", b"br, zstd"])
def test_nobody_asks_for_a_coded_answer(clock, wish):
    up, backend = upstream(clock)
    headers = for_backend({b"accept-encoding": wish}, b"application/json", None)
    sending = up.send("/p", headers, BytesBody(b"{}"))
    assert b"encoding" not in backend.link.received.lower()
    sending.addErrback(lambda _: None).cancel()


@pytest.mark.parametrize("coding", ["gzip", "br", "x", "identity, gzip", "GZIP"])
def test_a_coded_answer_is_refused_and_its_connection_closed(clock, coding):
    up, backend = upstream(clock)
    sending = up.send("/p", Headers(), BytesBody(b"{}"))
    backend.link.answer(
        raw_answer(200, b"\x1f\x8b" * 50, {**JSON, "Content-Encoding": coding})[:-9]
    )
    failure_of(sending, CodedAnswer)
    clock.advance(0)
    assert not backend.link.wire.connected


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
def test_an_answer_in_the_identity_coding_is_as_it_is(clock, coding):
    up, backend = upstream(clock)
    sending = up.send("/p", Headers(), BytesBody(b"{}"))
    backend.link.answer(raw_answer(200, b"[]", {**JSON, "Content-Encoding": coding}))
    response = result_of(sending)
    assert result_of(content(response)) == b"[]"
    clock.advance(0)


def test_a_redirect_is_not_followed(clock):
    up, backend = upstream(clock)
    sending = up.send("/p", Headers(), BytesBody(b"{}"))
    backend.link.answer(raw_answer(307, b"", {"Location": "http://b:1/q"}))
    assert result_of(sending).code == 307
    assert len(backend.links) == 1
    clock.advance(0)


def test_cookies_are_not_kept(clock):
    up, backend = upstream(clock)
    for _ in range(2):
        sending = up.send("/p", Headers(), BytesBody(b"{}"))
        backend.links[-1].answer(raw_answer(200, b"", {"Set-Cookie": "tenant=1"}))
        result_of(sending)
    assert b"cookie" not in backend.links[1].received.lower()
    clock.advance(0)


# --- real connections ---------------------------------------------------------------------------


class Certificates:
    """A self-signed certificate for 127.0.0.1 and one for another host."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self, host: str, days: int = 1) -> tuple[Path, Any]:
        """The certificate's file, and a context factory for a server."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"llmproxy test {host}")])
        try:
            subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            subject = x509.DNSName(host)
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=9))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName([subject]), False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        path = self._folder / f"{host}{days}.pem"
        path.write_bytes(certificate.public_bytes(pem))
        private = path.with_suffix(".key")
        private.write_bytes(key.private_bytes(pem, *plain))
        return path, ssl.DefaultOpenSSLContextFactory(str(private), str(path))


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def ask(
    url: str, timeout_connect: float = 2.0, data: bytes = b"{}", **settings: Any
) -> bytes:
    """One request over a real connection; the answer's body."""
    backend = Backend(**{"name": "m", "url": url, "device": "gpu", **settings})
    up = connect(backend, reactor, timeout_connect)
    try:
        response = await up.send("/p", Headers(), BytesBody(data))
        body: bytes = await content(response)
        return body
    except Exception as failure:
        raise translate(failure) from failure
    finally:
        up.close()


ANSWER = json_answer(200, {})


@pytest_twisted.ensureDeferred
async def test_a_certificate_that_nobody_knows_is_refused_by_default(certificates):
    _, tls = certificates.make("127.0.0.1")
    async with ScriptedBackend([ANSWER], tls=tls) as backend:
        with pytest.raises(NotSent) as caught:
            await ask(backend.url)
        assert caught.value.status == 502
        assert backend.requests == []


@pytest_twisted.ensureDeferred
async def test_a_certificate_of_the_ca_file_is_good(certificates):
    ca_file, tls = certificates.make("127.0.0.1")
    async with ScriptedBackend([ANSWER], tls=tls) as backend:
        assert await ask(backend.url, ca=ca_file.read_text()) == b"{}"


@pytest.mark.parametrize("with_tls", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_large_body_arrives_as_it_is(certificates, with_tls):
    ca_file, tls = certificates.make("127.0.0.1")
    data = bytes(range(256)) * 12_345
    async with ScriptedBackend([ANSWER], tls=tls if with_tls else None) as backend:
        assert await ask(backend.url, ca=ca_file.read_text(), data=data) == b"{}"
        assert backend.requests[0].body == data


@pytest_twisted.ensureDeferred
async def test_every_certificate_of_the_ca_file_is_trusted(certificates):
    ca_file, tls = certificates.make("127.0.0.1")
    other, _ = certificates.make("other.example")
    ca_file.write_bytes(other.read_bytes() + b"# a comment\n" + ca_file.read_bytes())
    async with ScriptedBackend([ANSWER], tls=tls) as backend:
        assert await ask(backend.url, ca=ca_file.read_text()) == b"{}"


@pytest.mark.parametrize(("host", "days"), [("other.example", 1), ("127.0.0.1", -1)])
@pytest_twisted.ensureDeferred
async def test_a_certificate_of_another_host_or_time_is_refused(certificates, host, days):
    ca_file, tls = certificates.make(host, days)
    async with ScriptedBackend([ANSWER], tls=tls) as backend:
        with pytest.raises(NotSent):
            await ask(backend.url, ca=ca_file.read_text())
        assert backend.requests == []


@pytest.mark.parametrize(("host", "days"), [("127.0.0.1", 1), ("other.example", -1)])
@pytest_twisted.ensureDeferred
async def test_any_certificate_is_good_if_so_configured(certificates, host, days):
    _, tls = certificates.make(host, days)
    async with ScriptedBackend([ANSWER], tls=tls) as backend:
        assert await ask(backend.url, verify_ssl=False) == b"{}"


@pytest.mark.parametrize("verified", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_second_connection_resumes_the_session_of_the_first(certificates, verified):
    ca_file, tls = certificates.make("127.0.0.1")
    tls.getContext().set_session_id(b"test")
    reused: list[bool] = []
    async with ScriptedBackend([ANSWER], tls=tls) as backend:
        trust = {"ca": ca_file.read_text()} if verified else {"verify_ssl": False}
        settings = Backend(name="m", url=backend.url, device="gpu", **trust)
        up = connect(settings, reactor, 2.0)
        for _ in range(2):
            await content(await up.send("/p", Headers(), BytesBody(b"{}")))
            agent: Any = up.agent
            connection = agent._idle.pop()
            # pyOpenSSL has no name for it.
            lib: Any = SSL._lib
            reused.append(bool(lib.SSL_session_reused(connection.wire.getHandle()._ssl)))
            connection.abort()
        up.close()
    assert reused == [False, True]


@pytest_twisted.ensureDeferred
async def test_a_backend_that_speaks_no_tls_was_sent_nothing():
    async with ScriptedBackend([ANSWER], on_connect=[b"HTTP/1.1 400 Bad\r\n\r\n"]) as backend:
        with pytest.raises(NotSent):
            await ask(backend.url.replace("http:", "https:"))


@pytest_twisted.ensureDeferred
async def test_a_body_can_be_had_after_its_connection_with_tls_has_ended(certificates):
    _, tls = certificates.make("127.0.0.1")
    answer = json_answer(200, {"a": 1}, {"Connection": "close"})
    async with ScriptedBackend([answer, Close()], tls=tls) as backend:
        settings = Backend(name="m", url=backend.url, device="gpu", verify_ssl=False)
        up = connect(settings, reactor, 2.0)
        response: Any = await up.send("/p", Headers(), BytesBody(b"{}"))
        response._connection.hold(False)  # its end has come before anybody wants the body
        await backend.connections[0].when_closed()
        await deferLater(reactor, 0.05)
        assert await content(response) == b'{"a":1}'
        up.close()


@pytest_twisted.ensureDeferred
async def test_a_backend_can_have_an_ipv6_address():
    with pytest.raises(NotSent):  # by its port, not for its name
        await ask("http://[::1]:1")


@pytest_twisted.ensureDeferred
async def test_a_backend_that_is_not_there_was_sent_nothing():
    async with ScriptedBackend() as backend:
        url = backend.url
    with pytest.raises(NotSent):
        await ask(url)


@pytest_twisted.ensureDeferred
async def test_cancelling_a_request_closes_its_connection():
    async with ScriptedBackend([Stall()]) as backend:
        settings = Backend(name="m", url=backend.url, device="gpu")
        up = connect(settings, reactor, 2.0)
        sending = up.send("/p", Headers(), BytesBody(b"{}"))
        await backend.request()
        sending.addErrback(lambda _: None).cancel()
        await backend.connections[0].when_closed()
        up.close()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest_twisted.ensureDeferred
async def test_connections_are_used_again(certificates, secure):
    ca_file, tls = certificates.make("127.0.0.1")
    async with ScriptedBackend([ANSWER], tls=tls if secure else None) as backend:
        settings = Backend(name="m", url=backend.url, device="gpu", ca=ca_file.read_text())
        up = connect(settings, reactor, 2.0)
        for _ in range(3):
            await content(await up.send("/p", Headers(), BytesBody(b"{}")))
        assert len(backend.connections) == 1
        up.close()


@pytest_twisted.ensureDeferred
async def test_a_connection_on_which_something_has_come_is_not_used_though_it_was_not_read_yet():
    async with ScriptedBackend([ANSWER]) as backend:
        up = connect(Backend(name="m", url=backend.url, device="gpu"), reactor, 2.0)
        await content(await up.send("/p", Headers(), BytesBody(b"{}")))
        backend.connections[0].write(ANSWER)
        sending = up.send("/p", Headers(), BytesBody(b"{}"))  # the reactor has not turned
        await content(await sending)
        assert [len(each.requests) for each in backend.connections] == [1, 1]
        up.close()
