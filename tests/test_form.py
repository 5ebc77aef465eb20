"""An audio upload on its way: at the backend's pace, and to one end whatever goes wrong."""

from __future__ import annotations

import re

import pytest
import treq
from backend import JSON, head, raw_answer
from deferreds import failure_of, is_waiting, result_of, started
from memory import Backend, Link
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface.verify import verifyObject

from llmproxy import config
from llmproxy.agent import Response
from llmproxy.errors import BackendError, BackendTimeout, BadRequest, BodyTooLarge, RequestTimeout
from llmproxy.form import Form
from llmproxy.upload import HIGH_WATER, ClientGone, Upload
from llmproxy.upstream import Upstream, translate

TIMEOUT_S, PATIENCE_S = 5.0, 7.0
BOUNDARY = b"--X"


def field(name: bytes, value: bytes) -> bytes:
    return b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (
        BOUNDARY,
        name,
        value,
    )


FILE_HEAD = (
    b'--%b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' % BOUNDARY
)
MODEL = field(b"model", b"whisper")
LAST = b"\r\n--%b--\r\n" % BOUNDARY
OURS = field(b"model", b"org/whisper") + field(b"response_format", b"verbose_json")


class Way:
    """A client's upload, the form made of it, and the backend that it goes to."""

    def __init__(self, clock: Clock, hold_limit: int = 1000, max_size: int = 10**9) -> None:
        self.clock = clock
        self.held = False
        self.upload = Upload(None, clock, self)
        self.form = Form(
            self.upload,
            BOUNDARY,
            clock,
            hold_limit=hold_limit,
            max_size=max_size,
            timeout_s=TIMEOUT_S,
        )
        self.sent: list[bool] = []
        self.backend = Backend(clock)

    def hold_up(self, hold: bool) -> None:
        self.held = hold

    def invite_body(self) -> None:
        """The client sends it anyway."""

    def come(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.upload.received(piece)

    def send(self) -> Deferred[Response]:
        """Name the backend's model, and begin to send; as an exchange does."""
        self.form.start("org/whisper", PATIENCE_S)
        self.form.on_sent = lambda: self.sent.append(True)
        settings = config.Backend(name="m", url="http://b:1", device="gpu")
        upstream = Upstream(settings, self.backend.agent)
        return upstream.send("/v1/audio/transcriptions", Headers(), self.form)

    @property
    def link(self) -> Link:
        return self.backend.link

    @property
    def body(self) -> bytes:
        """What the backend has of the form, without the chunks' framing."""
        rest, body = self.link.received.partition(b"\r\n\r\n")[2], b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return body

    @property
    def is_whole(self) -> bool:
        return self.link.received.endswith(b"\r\n0\r\n\r\n")

    def check_over(self) -> None:
        """Nothing is left, and what still comes is of no effect."""
        self.clock.advance(0)
        assert self.clock.getDelayedCalls() == []
        if self.backend.links:
            before = self.link.received
            self.come(b"too late")
            self.form.resumeProducing()
            assert self.link.received == before


@pytest.fixture
def way(clock: Clock) -> Way:
    return Way(clock)


@pytest.fixture
def sending(way: Way) -> Deferred[Response]:
    """A form whose model came first, and some of its file."""
    way.come(MODEL, FILE_HEAD)
    assert result_of(started(way.form.model())) == "whisper"
    way.come(b"sound" * 10)
    return way.send()


def test_a_form_is_a_body_of_unknown_length(way):
    assert verifyObject(IBodyProducer, way.form)
    assert way.form.length is UNKNOWN_LENGTH


def test_the_model_is_known_as_soon_as_its_field_came(way):
    asked = started(way.form.model())
    way.come(MODEL[:-5])
    assert is_waiting(asked)
    way.come(MODEL[-5:], FILE_HEAD)
    assert result_of(asked) == "whisper"


def test_a_model_that_comes_last_is_waited_for_and_the_file_kept(way):
    asked = started(way.form.model())
    way.come(FILE_HEAD, b"sound\r\n", MODEL[:-1])
    assert is_waiting(asked)
    way.come(MODEL[-1:] + LAST[2:])
    way.upload.ended()
    assert result_of(asked) == "whisper"
    sending = way.send()
    assert way.body == FILE_HEAD + b"sound\r\n" + OURS + LAST[2:]
    assert way.is_whole
    sending.addErrback(lambda _: None).cancel()


def test_what_is_kept_for_a_model_that_does_not_come_has_a_limit(way):
    asked = started(way.form.model())
    way.come(FILE_HEAD, bytes(1100))
    assert failure_of(asked, BodyTooLarge).status == 413


@pytest.mark.parametrize("body", [FILE_HEAD + LAST, b"", b"nonsense", MODEL[:-9]])
def test_a_form_without_a_model_is_refused(way, body):
    way.come(*([body] if body else []))
    way.upload.ended()
    failure_of(started(way.form.model()), BadRequest)


def test_a_client_that_sends_no_model_is_not_waited_for_for_ever(way, clock):
    asked = started(way.form.model())
    way.come(FILE_HEAD)
    clock.advance(TIMEOUT_S)
    assert failure_of(asked, RequestTimeout).status == 408


def test_a_client_that_leaves_before_its_model_is_gone(way):
    asked = started(way.form.model())
    way.upload.lost()
    failure_of(asked, ClientGone)


def test_a_form_streams_through_before_it_is_whole(way, sending):
    begun = way.body
    assert begun.startswith(FILE_HEAD + b"sound")
    assert not way.sent
    way.come(b"more" * 10)
    assert len(way.body) == len(begun) + 40
    way.come(LAST)
    way.upload.ended()
    assert way.body == FILE_HEAD + b"sound" * 10 + b"more" * 10 + b"\r\n" + OURS + LAST[2:]
    assert (way.is_whole, way.sent) == (True, [True])
    way.link.answer(raw_answer(200, b"{}", JSON))
    assert result_of(sending).code == 200
    way.clock.advance(0)


def test_the_backends_header_names_the_clients_boundary(way):
    boundary = re.search(rb'boundary="(.*)"', way.form.content_type)
    assert boundary is not None
    assert boundary[1] == BOUNDARY


def test_a_slow_backend_holds_the_client_up(way, sending):
    way.link.wire.slow()
    way.come(bytes(1000))  # the piece that was being waited for
    before = len(way.link.received)
    way.come(bytes(HIGH_WATER))
    assert way.held
    assert len(way.link.received) == before
    way.clock.advance(PATIENCE_S - 0.1)  # longer than a client may take: it is not to blame
    assert is_waiting(sending)
    way.link.wire.drained()
    assert not way.held
    assert len(way.link.received) > before + HIGH_WATER
    sending.addErrback(lambda _: None).cancel()
    way.form.stopProducing()
    way.check_over()


def test_a_backend_that_takes_no_more_does_not_hold_the_client_up_for_ever(way, sending):
    way.link.wire.slow()
    way.come(bytes(1000))
    way.clock.advance(PATIENCE_S)
    assert isinstance(translate(failure_of(sending, Exception)), BackendTimeout)
    assert way.link.wire.aborted
    assert not way.is_whole
    way.check_over()


def test_a_client_that_leaves_in_mid_upload_ends_it_without_an_end(way, sending):
    way.upload.lost()
    failure = failure_of(sending, Exception)
    assert isinstance(translate(failure), ClientGone)
    assert way.link.wire.aborted
    assert not way.is_whole
    assert not way.sent
    way.clock.advance(0)
    assert way.clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    "piece",
    [b"\r\n" + MODEL, b"\n" + LAST[2:], LAST[:-4] + b"x\r\n"],
    ids=["twice", "line end", "boundary"],
)
def test_a_form_that_is_malformed_in_its_middle_ends_it_without_an_end(way, sending, piece):
    way.come(piece)
    assert isinstance(translate(failure_of(sending, Exception)), BadRequest)
    assert way.link.wire.aborted
    assert not way.is_whole
    way.check_over()


def test_a_form_that_is_cut_short_ends_it_without_an_end(way, sending):
    way.upload.ended()
    assert isinstance(translate(failure_of(sending, Exception)), BadRequest)
    assert not way.is_whole
    way.check_over()


def test_a_client_that_stalls_in_mid_upload_ends_it(way, sending):
    way.clock.advance(TIMEOUT_S)
    assert isinstance(translate(failure_of(sending, Exception)), RequestTimeout)
    assert way.link.wire.aborted
    way.check_over()


def test_a_form_over_the_limit_ends_it(clock):
    way = Way(clock, max_size=1000)
    way.come(MODEL, FILE_HEAD)
    result_of(started(way.form.model()))
    sending = way.send()
    way.come(bytes(600))
    assert is_waiting(sending)
    way.come(bytes(600))
    assert isinstance(translate(failure_of(sending, Exception)), BodyTooLarge)
    assert not way.is_whole
    way.check_over()


@pytest.mark.parametrize("error", [None, ConnectionLost()], ids=["closed", "reset"])
@pytest.mark.parametrize("slow", [False, True])
def test_a_backend_that_closes_in_mid_upload_ends_it_in_silence(way, sending, error, slow):
    if slow:
        way.link.wire.slow()
        way.come(b"x")
    way.link.close(error)
    assert isinstance(translate(failure_of(sending, Exception)), BackendError)
    way.check_over()


@pytest.mark.parametrize("slow", [False, True])
def test_a_backend_that_answers_in_mid_upload_is_heard_and_gets_no_more(way, sending, slow):
    if slow:
        way.link.wire.slow()
        way.come(b"x")
    way.link.answer(raw_answer(413, b"too long", JSON))
    response = result_of(sending)
    assert response.code == 413
    assert result_of(treq.content(response)) == b"too long"
    way.form.stopProducing()  # as a forward does in the end
    way.check_over()
    assert not way.is_whole
    assert not way.link.wire.connected


@pytest.mark.parametrize("slow", [False, True])
def test_cancelling_in_mid_upload_closes_the_connection(way, sending, slow):
    if slow:
        way.link.wire.slow()
        way.come(b"x")
    sending.addErrback(lambda _: None).cancel()
    assert way.link.wire.aborted
    way.form.stopProducing()
    way.check_over()
    assert not way.is_whole


def test_a_form_that_was_never_sent_can_be_stopped(way):
    way.form.stopProducing()
    way.check_over()


def test_half_a_header_is_no_answer(way, sending):
    way.link.answer(head(413)[:10])
    assert is_waiting(sending)
    way.link.close()
    failure_of(sending, Exception)
    way.check_over()
