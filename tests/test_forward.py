"""One request to one backend: every way in which it can end, and what is known then.

Twisted's real HTTP client and server, without sockets, and a clock that the test moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import orjson
import pytest
from backend import CHUNKED, DONE, JSON, LAST_CHUNK, chunk, head, raw_answer, sse_event
from deferreds import is_waiting, result_of, started
from memory import Backend, Link, Server, request_bytes
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost, ConnectionRefusedError, DNSLookupError
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers

from llmproxy import config, forward
from llmproxy.agent import BytesBody, CodedAnswer
from llmproxy.answers import Answer
from llmproxy.backends import Route
from llmproxy.billing import NOTHING
from llmproxy.downstream import Downstream
from llmproxy.endpoints import Shape
from llmproxy.errors import (
    BackendError,
    BackendTimeout,
    BadRequest,
    InsufficientQuota,
    Unavailable,
)
from llmproxy.forward import END_GRACE_S, KEEPALIVE, Ending, Forward, Lease, Order, Pace, Timing
from llmproxy.meter import StreamMeter, read_answer
from llmproxy.model import Counts, Kind, Outcome, Reading
from llmproxy.steps import Turns
from llmproxy.upstream import NotSent, Upstream

SILENCE_S, KEEPALIVE_S, DRAIN_S = 60.0, 15.0, 300.0
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
COUNTS = {Kind.PROMPT: 3, Kind.COMPLETION: 2}
COMPLETION = orjson.dumps({"choices": [], "usage": USAGE})
HEL, LO = (
    sse_event({"choices": [{"index": 0, "delta": {"content": text}}]}) for text in ("Hel", "lo")
)
ROLE = sse_event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
USED = sse_event({"choices": [], "usage": USAGE})
ERROR = sse_event({"error": {"message": "canary", "code": 500}})
STREAM = head(200, CHUNKED)
UNFRAMED = head(200, {"Content-Type": "text/event-stream", "Connection": "close"})
EXACT = Reading(COUNTS, exact=True, answered=True)
RUNNING = Reading({Kind.COMPLETION: 2}, answered=True)


class Story:
    """A client's request that was admitted, and its way to a backend and back."""

    def __init__(
        self,
        clock: Clock,
        *,
        stream: bool = True,
        convert: Callable[[bytes], tuple[bytes, Iterable[bytes]]] | None = None,
        keepalive_s: float = 0,
        lease: Lease | None = None,
        **backend: Any,
    ) -> None:
        self.clock = clock
        self.server = Server(clock)
        self.server.send(request_bytes())
        self.request = self.server.requests[0]
        self.down = Downstream(self.request, clock, 1000)
        self.backend = Backend(clock)
        settings = config.Backend(
            **{
                "name": "m",
                "url": "http://b:1",
                "device": "gpu",
                "drain_timeout": DRAIN_S,
                **backend,
            }
        )
        upstream = Upstream(settings, self.backend.agent)
        order = Order(
            route=Route(settings, upstream),
            path="/v1/chat/completions",
            headers=Headers({b"Content-Type": [b"application/json"]}),
            body=BytesBody(b"{}"),
            read=lambda body: read_answer(Shape.CHAT, body),
            meter=StreamMeter(Shape.CHAT) if stream else None,
            convert=convert,
        )
        self.first_tokens: list[float] = []
        self.gaps: list[float] = []
        self.forward = Forward(
            order,
            self.down,
            clock,
            Turns(clock),
            Timing(SILENCE_S, keepalive_s),
            Pace(self.first_tokens.append, self.gaps.append),
            lease,
        )
        self.running: Deferred[Ending] | None = None

    def begin(self) -> Story:
        self.running = started(self.forward.run())
        return self

    def answer(self, *parts: bytes) -> Story:
        """From the backend, each part in a packet of its own."""
        for part in parts:
            self.link.answer(part)
        return self

    @property
    def link(self) -> Link:
        return self.backend.link

    @property
    def shown(self) -> bytes:
        """The body that the client has, without its framing."""
        body = self.server.sent.partition(b"\r\n\r\n")[2]
        return b"".join(part for part in body.split(b"\r\n")[1::2])

    @property
    def is_running(self) -> bool:
        assert self.running is not None
        return is_waiting(self.running)

    def end(self) -> Ending:
        """How it ended; and nothing may be left."""
        assert self.running is not None
        ending = result_of(self.running)
        self.clock.advance(0)
        if self.backend.links:
            assert not self.link.wire.connected
        self.server.leave()  # after the end nobody is asked any more
        self.clock.advance(0)
        assert self.clock.getDelayedCalls() == []
        return ending


@pytest.fixture
def story(clock: Clock) -> Story:
    return Story(clock).begin()


@pytest.fixture
def whole(clock: Clock) -> Story:
    return Story(clock, stream=False).begin()


def outcome_of(ending: Ending) -> tuple[Outcome, Reading, int | None]:
    return ending.outcome, ending.reading, ending.status


# --- whole answers ----------------------------------------------------------------------------


def test_a_whole_answer_is_kept_until_it_is_released(whole):
    whole.answer(raw_answer(200, COMPLETION, JSON))
    ending = whole.end()
    assert outcome_of(ending) == (Outcome.COMPLETE, EXACT, 200)
    assert ending.last == Answer(200, COMPLETION, [(b"Content-Type", b"application/json")])
    assert whole.server.sent == b""


def test_a_stream_that_was_asked_for_may_be_answered_whole(story):
    story.answer(raw_answer(200, COMPLETION, JSON))
    assert outcome_of(story.end()) == (Outcome.COMPLETE, EXACT, 200)


def test_a_whole_answer_may_come_without_a_length(whole):
    whole.answer(head(200, {**JSON, "Connection": "close"}), COMPLETION[:9], COMPLETION[9:])
    assert whole.is_running
    whole.link.close()
    assert outcome_of(whole.end()) == (Outcome.COMPLETE, EXACT, 200)


def test_the_request_is_sent_as_it_is_and_once(whole):
    sent = whole.link.received
    assert sent.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert sent.endswith(b"\r\n\r\n{}")
    assert b"accept-encoding" not in sent.lower()
    assert sent.lower().count(b"content-length: 2\r\n") == 1
    whole.answer(raw_answer(200, COMPLETION, JSON)).end()
    assert len(whole.backend.links) == 1


@pytest.mark.parametrize(
    "cut",
    [
        head(200, {**JSON, "Content-Length": "99"}) + COMPLETION,
        head(200, {**JSON, "Transfer-Encoding": "chunked"}) + chunk(COMPLETION),
        head(200, {**JSON, "Connection": "close"}) + COMPLETION[:-1],
    ],
    ids=["length", "chunks", "unframed"],
)
@pytest.mark.parametrize("error", [None, ConnectionLost()], ids=["closed", "reset"])
def test_half_an_answer_is_truncated_and_not_shown(whole, cut, error):
    whole.answer(cut).link.close(error)
    ending = whole.end()
    assert (ending.outcome, ending.reading.exact, dict(ending.reading.counts)) == (
        Outcome.TRUNCATED,
        False,
        {},
    )
    assert isinstance(ending.last, BackendError)


def test_a_backend_that_falls_silent_in_a_whole_answer_is_stalled(whole):
    whole.answer(head(200, {**JSON, "Content-Length": "99"}), b"{")
    whole.clock.advance(SILENCE_S)
    ending = whole.end()
    assert outcome_of(ending) == (Outcome.STALLED, Reading(), 200)
    assert isinstance(ending.last, BackendTimeout)


@pytest.mark.parametrize("framing", ["Content-Length: 200", "Transfer-Encoding: chunked"])
def test_an_answer_that_is_too_long_is_cut_and_left_to_the_operator(whole, monkeypatch, framing):
    monkeypatch.setattr(forward, "MAX_ANSWER", 100)
    name, _, value = framing.partition(": ")
    whole.answer(head(200, {**JSON, name: value}), chunk(bytes(101)))
    ending = whole.end()
    assert outcome_of(ending) == (Outcome.BACKEND_FAILED, Reading(), 200)
    assert isinstance(ending.last, BackendError)


def test_what_the_client_asked_for_is_made_of_the_answer(clock):
    story = Story(clock, stream=False, convert=lambda body: (b"text/x", [body.upper()]))
    story.begin().answer(raw_answer(200, COMPLETION, JSON))
    ending = story.end()
    assert ending.outcome is Outcome.COMPLETE
    assert ending.last == Answer(200, COMPLETION.upper(), [(b"Content-Type", b"text/x")])


def test_others_go_on_between_the_pieces_of_what_is_made_of_an_answer(clock):
    made: list[bytes] = []

    def convert(body: bytes) -> tuple[bytes, Iterator[bytes]]:
        return b"text/x", pieces()

    def pieces() -> Iterator[bytes]:
        for piece in (b"a", b"b", b"c", b"d"):
            made.append(piece)
            yield piece

    story = Story(clock, stream=False, convert=convert)
    story.begin().answer(raw_answer(200, COMPLETION, JSON))
    assert len(made) == 2
    clock.advance(0)
    assert story.end().last == Answer(200, b"abcd", [(b"Content-Type", b"text/x")])


def test_an_answer_that_can_not_be_converted_is_not_settled(clock):
    def convert(body: bytes) -> tuple[bytes, list[bytes]]:
        raise BackendError("It has no text.")

    story = Story(clock, stream=False, convert=convert)
    story.begin().answer(raw_answer(200, COMPLETION, JSON))
    ending = story.end()
    assert (ending.outcome, ending.reading.exact) == (Outcome.BACKEND_FAILED, False)
    assert isinstance(ending.last, BackendError)


# --- streams ----------------------------------------------------------------------------------


def test_the_end_of_a_stream_is_kept_and_all_before_it_shown(story):
    story.answer(STREAM, chunk(HEL), chunk(LO), chunk(USED), chunk(DONE), LAST_CHUNK)
    shown = story.shown
    ending = story.end()
    assert outcome_of(ending) == (Outcome.COMPLETE, EXACT, 200)
    assert (shown, ending.last) == (HEL + LO, DONE)


def test_the_first_token_and_the_gaps_between_chunks_are_told(story, clock):
    story.answer(STREAM)
    for piece in (chunk(ROLE), chunk(HEL), chunk(LO)):
        clock.advance(0.5)
        story.answer(piece)
    assert story.first_tokens == [1.0]
    assert story.gaps == [0.5, 0.5]
    story.forward.stop()


def test_chunks_pass_as_they_come(story):
    story.answer(STREAM, chunk(HEL))
    assert story.shown == HEL
    assert b"Content-Type: text/event-stream" in story.server.sent
    story.answer(chunk(LO))
    assert story.shown == HEL + LO
    story.forward.stop()
    story.end()


def test_usage_that_comes_after_the_last_event_counts(story):
    story.answer(STREAM, chunk(HEL), chunk(DONE), chunk(USED), LAST_CHUNK)
    assert outcome_of(story.end()) == (Outcome.COMPLETE, EXACT, 200)


def test_a_backend_that_does_not_close_its_stream_is_waited_for_a_little(story):
    story.answer(STREAM, chunk(HEL), chunk(USED), chunk(DONE))
    story.clock.advance(END_GRACE_S - 0.1)
    assert story.is_running
    story.clock.advance(0.1)
    ending = story.end()
    assert (ending.outcome, ending.last) == (Outcome.COMPLETE, DONE)


def test_a_backend_that_goes_on_for_ever_after_the_end_is_not_shown(story):
    story.answer(STREAM, chunk(HEL), chunk(USED), chunk(DONE), chunk(b": canary\n\n"))
    assert story.shown == HEL
    story.clock.advance(END_GRACE_S)
    story.end()


def test_a_stream_without_a_frame_is_whole_when_its_last_event_came(story):
    story.answer(UNFRAMED, HEL, USED, DONE).link.close()
    assert outcome_of(story.end()) == (Outcome.COMPLETE, EXACT, 200)


@pytest.mark.parametrize("start", [STREAM, UNFRAMED], ids=["chunks", "unframed"])
@pytest.mark.parametrize("error", [None, ConnectionLost()], ids=["closed", "reset"])
def test_a_stream_that_breaks_off_is_truncated(story, start, error):
    parts = (HEL, LO) if start is UNFRAMED else (chunk(HEL), chunk(LO))
    story.answer(start, *parts).link.close(error)
    ending = story.end()
    assert outcome_of(ending) == (Outcome.TRUNCATED, RUNNING, 200)
    assert isinstance(ending.last, BackendError)


def test_a_stream_that_ends_cleanly_without_its_last_event_is_truncated(story):
    story.answer(STREAM, chunk(HEL), chunk(LO), LAST_CHUNK)
    assert outcome_of(story.end()) == (Outcome.TRUNCATED, RUNNING, 200)


def test_usage_that_came_before_a_stream_broke_off_is_the_backends_own(story):
    story.answer(STREAM, chunk(HEL), chunk(USED)).link.close(ConnectionLost())
    assert outcome_of(story.end()) == (Outcome.TRUNCATED, EXACT, 200)


def test_a_stream_that_is_reset_after_its_last_event_is_whole(story):
    story.answer(STREAM, chunk(HEL), chunk(USED), chunk(DONE)).link.close(ConnectionLost())
    assert outcome_of(story.end()) == (Outcome.COMPLETE, EXACT, 200)


def test_a_stream_that_falls_silent_is_stalled(story):
    story.answer(STREAM, chunk(HEL))
    story.clock.advance(SILENCE_S - 1)
    story.answer(chunk(LO))
    story.clock.advance(SILENCE_S - 1)
    assert story.is_running
    story.clock.advance(1)
    ending = story.end()
    assert outcome_of(ending) == (Outcome.STALLED, RUNNING, 200)
    assert isinstance(ending.last, BackendTimeout)


def test_an_error_in_place_of_an_answer_costs_nothing(story):
    story.answer(STREAM, chunk(ERROR), LAST_CHUNK)
    ending = story.end()
    assert (ending.outcome, ending.reading.exact) == (Outcome.BACKEND_FAILED, True)
    assert not any(ending.reading.counts.values())
    assert story.shown == ERROR


def test_an_error_in_mid_answer_leaves_what_was_counted(story):
    story.answer(STREAM, chunk(HEL), chunk(LO), chunk(ERROR), LAST_CHUNK)
    assert outcome_of(story.end()) == (Outcome.BACKEND_FAILED, RUNNING, 200)


def test_an_error_that_is_followed_by_a_reset_is_truncated(story):
    story.answer(STREAM, chunk(HEL), chunk(LO), chunk(ERROR)).link.close(ConnectionLost())
    ending = story.end()
    assert outcome_of(ending) == (Outcome.TRUNCATED, RUNNING, 200)


def test_what_comes_after_an_answer_is_given_to_nobody(story):
    evil = raw_answer(200, b'{"evil":1}', JSON)
    story.answer(STREAM, chunk(HEL) + chunk(USED) + chunk(DONE) + LAST_CHUNK + evil, evil)
    ending = story.end()
    assert ending.last == DONE
    assert b"evil" not in story.server.sent


# --- no answer --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ConnectionRefusedError(), DNSLookupError(), ConnectionLost()])
def test_a_backend_that_can_not_be_reached_has_cost_nothing(clock, error):
    story = Story(clock)
    story.backend.refuse = error
    ending = story.begin().end()
    if not isinstance(error, ConnectionLost):
        assert isinstance(ending.last, NotSent)
    assert isinstance(ending.last, BackendError)
    assert outcome_of(ending) == (Outcome.BACKEND_FAILED, NOTHING, None)


@pytest.mark.parametrize("error", [None, ConnectionLost()], ids=["closed", "reset"])
@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Ty"], ids=["", "half a head"])
def test_a_backend_that_closes_without_an_answer_may_have_worked(story, error, begun):
    story.answer(begun).link.close(error)
    ending = story.end()
    assert outcome_of(ending) == (Outcome.BACKEND_FAILED, Reading(), None)
    assert isinstance(ending.last, BackendError)


@pytest.mark.parametrize("garbage", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n"])
def test_a_backend_that_speaks_no_http_has_no_answer(story, garbage):
    story.answer(garbage)
    story.clock.advance(SILENCE_S)
    ending = story.end()
    assert (ending.outcome, ending.status) == (Outcome.BACKEND_FAILED, None)
    assert isinstance(ending.last, BackendError)


def test_a_backend_that_never_answers_is_given_up(story):
    story.clock.advance(SILENCE_S - 1)
    assert story.is_running
    story.clock.advance(1)
    assert story.link.wire.aborted
    ending = story.end()
    assert outcome_of(ending) == (Outcome.BACKEND_FAILED, Reading(), None)
    assert isinstance(ending.last, BackendTimeout)


def test_the_wait_for_an_answer_begins_when_the_request_was_sent(clock):
    story = Story(clock)
    story.backend.hold = Deferred()
    story.begin()
    clock.advance(2 * SILENCE_S)  # connecting has a limit of its own
    assert story.is_running
    story.backend.hold.callback(None)
    clock.advance(SILENCE_S - 1)
    story.answer(raw_answer(200, COMPLETION, JSON))
    assert story.end().outcome is Outcome.COMPLETE


# --- refusals -----------------------------------------------------------------------------------


def test_a_refusal_is_passed_on_and_costs_nothing(story):
    fields = {"Retry-After": "7", "Set-Cookie": "canary"}
    story.answer(raw_answer(429, b"slow", fields))
    ending = story.end()
    assert outcome_of(ending) == (Outcome.REFUSED, NOTHING, 429)
    assert ending.last == Answer(429, b"slow", [(b"Retry-After", b"7")])


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 500, 503])
def test_other_refusals_are_masked_and_cost_nothing(story, status):
    story.answer(raw_answer(status, b"canary", {"Location": "http://evil/"}))
    ending = story.end()
    assert outcome_of(ending) == (Outcome.REFUSED, NOTHING, status)
    assert isinstance(ending.last, BackendError)
    assert len(story.backend.links) == 1  # nothing is followed


def test_a_refusal_about_the_context_is_the_clients_own_error(story):
    story.answer(raw_answer(500, b"maximum context length is 5"))
    assert isinstance(story.end().last, BadRequest)


@pytest.mark.parametrize("status", [201, 202, 206])
def test_another_success_may_have_cost_something(story, status):
    story.answer(raw_answer(status, COMPLETION, JSON))
    ending = story.end()
    assert outcome_of(ending) == (Outcome.REFUSED, Reading(), status)
    assert isinstance(ending.last, BackendError)


def test_an_answer_without_a_body_is_no_result(story):
    story.answer(head(204))
    assert outcome_of(story.end()) == (Outcome.REFUSED, Reading(), 204)


@pytest.mark.parametrize("how", ["broken", "stalled", "too long"])
def test_half_a_refusal_is_told_without_its_body(story, monkeypatch, how):
    monkeypatch.setattr(forward, "MAX_REFUSAL", 10)
    story.answer(head(400, {"Content-Length": "99"}), b"canary")
    if how == "broken":
        story.link.close(ConnectionLost())
    elif how == "stalled":
        story.clock.advance(SILENCE_S)
    else:
        story.answer(bytes(10))
    ending = story.end()
    assert outcome_of(ending) == (Outcome.REFUSED, NOTHING, 400)
    assert isinstance(ending.last, Answer)
    assert (ending.last.status, ending.last.body) == (400, b"")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"Content-Type": "text/html"}, BackendError),
        ({}, BackendError),
        ({**JSON, "Content-Encoding": "gzip"}, CodedAnswer),
    ],
)
def test_an_answer_that_can_not_be_read_is_masked_and_closed(story, fields, error):
    story.answer(head(200, {**fields, "Content-Length": "99"}), b"canary")
    ending = story.end()
    assert ending.outcome is Outcome.BACKEND_FAILED
    assert ending.reading == Reading()
    assert isinstance(ending.last, error)


def test_a_stream_that_was_not_asked_for_is_masked(whole):
    whole.answer(STREAM, chunk(HEL))
    ending = whole.end()
    assert outcome_of(ending) == (Outcome.BACKEND_FAILED, Reading(), 200)
    assert whole.server.sent == b""


# --- the client leaves --------------------------------------------------------------------------


def test_a_stream_is_read_to_its_end_for_a_client_that_left(story):
    story.answer(STREAM, chunk(HEL))
    story.server.leave()
    story.clock.advance(SILENCE_S - 1)
    story.answer(chunk(LO), chunk(USED), chunk(DONE), LAST_CHUNK)
    assert outcome_of(story.end()) == (Outcome.CLIENT_GONE, EXACT, 200)


def test_a_whole_answer_is_read_for_a_client_that_left_before_it(whole):
    whole.server.leave()
    assert whole.is_running
    whole.answer(raw_answer(200, COMPLETION, JSON))
    assert outcome_of(whole.end()) == (Outcome.CLIENT_GONE, EXACT, 200)


def test_reading_on_has_a_limit(story):
    story.answer(STREAM, chunk(HEL))
    story.server.leave()
    for second in range(int(DRAIN_S)):
        assert story.is_running, second
        story.answer(chunk(b": still here\n\n"))
        story.clock.advance(1)
    ending = story.end()
    assert outcome_of(ending) == (
        Outcome.CLIENT_GONE,
        Reading({Kind.COMPLETION: 1}, answered=True),
        200,
    )


def test_waiting_for_an_answer_that_nobody_wants_has_the_same_limit(clock):
    story = Story(clock, drain_timeout=5.0).begin()
    story.server.leave()
    clock.advance(5)
    assert story.link.wire.aborted
    assert outcome_of(story.end()) == (Outcome.CLIENT_GONE, Reading(), None)


def test_reading_on_has_a_limit_in_tokens(clock):
    story = Story(clock, drain_max_tokens=3).begin()
    story.answer(STREAM, chunk(HEL))
    story.server.leave()
    story.answer(*[chunk(LO)] * 3)
    assert story.is_running
    story.answer(chunk(LO))
    ending = story.end()
    assert (ending.outcome, dict(ending.reading.counts)) == (
        Outcome.CLIENT_GONE,
        {Kind.COMPLETION: 5},
    )


def test_a_stream_is_cancelled_for_a_client_that_left_if_so_configured(clock):
    story = Story(clock, on_disconnect="cancel").begin()
    story.answer(STREAM, chunk(HEL), chunk(LO))
    story.server.leave()
    assert story.link.wire.disconnecting
    assert outcome_of(story.end()) == (Outcome.CLIENT_GONE, RUNNING, 200)


def test_a_request_is_cancelled_before_its_answer_if_so_configured(clock):
    story = Story(clock, on_disconnect="cancel").begin()
    story.server.leave()
    assert story.link.wire.aborted
    assert outcome_of(story.end()) == (Outcome.CLIENT_GONE, Reading(), None)


@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
def test_nothing_is_sent_for_a_client_that_has_left_already(clock, on_disconnect):
    story = Story(clock, on_disconnect=on_disconnect)
    story.server.leave()
    assert outcome_of(story.begin().end()) == (Outcome.CLIENT_GONE, NOTHING, None)
    assert story.backend.links == []


def test_a_connection_that_is_being_made_for_a_client_that_left_costs_nothing(clock):
    story = Story(clock, on_disconnect="cancel")
    story.backend.hold = Deferred()
    story.begin()
    story.server.leave()
    assert outcome_of(story.end()) == (Outcome.CLIENT_GONE, NOTHING, None)
    assert story.backend.links == []


def test_a_backend_that_was_held_up_by_a_client_goes_on_when_it_leaves(story):
    story.answer(STREAM, chunk(HEL))
    story.server.wire.slow()
    assert not story.link.wire.is_reading
    story.clock.advance(2 * SILENCE_S)  # not the backend's silence
    assert story.is_running
    story.server.leave()
    assert story.link.wire.is_reading
    story.answer(chunk(LO), chunk(USED), chunk(DONE), LAST_CHUNK)
    assert outcome_of(story.end()) == (Outcome.CLIENT_GONE, EXACT, 200)


def test_the_clients_speed_governs_the_backend(story):
    story.answer(STREAM, chunk(HEL))
    story.server.wire.slow()
    assert not story.link.wire.is_reading
    story.server.wire.drained()
    assert story.link.wire.is_reading
    story.answer(chunk(USED), chunk(DONE), LAST_CHUNK)
    assert not story.server.governed
    story.end()


# --- the proxy stops ----------------------------------------------------------------------------


def test_a_stop_while_a_connection_is_made_costs_nothing(clock):
    story = Story(clock)
    story.backend.hold = Deferred()
    story.begin().forward.stop()
    ending = story.end()
    assert outcome_of(ending) == (Outcome.CLIENT_GONE, NOTHING, None)
    assert isinstance(ending.last, Unavailable)


def test_a_stop_before_it_began_sends_nothing(clock):
    story = Story(clock)
    story.forward.stop()
    assert outcome_of(story.begin().end()) == (Outcome.CLIENT_GONE, NOTHING, None)
    assert story.backend.links == []


def test_a_stop_before_the_answer_leaves_it_to_the_operator(story):
    story.forward.stop()
    assert story.link.wire.aborted
    ending = story.end()
    assert outcome_of(ending) == (Outcome.CLIENT_GONE, Reading(), None)
    assert isinstance(ending.last, Unavailable)


def test_a_stop_in_mid_stream_leaves_what_was_counted(story):
    story.answer(STREAM, chunk(HEL), chunk(LO))
    story.forward.stop()
    ending = story.end()
    assert outcome_of(ending) == (Outcome.CLIENT_GONE, RUNNING, 200)
    assert isinstance(ending.last, Unavailable)


def test_a_stop_in_a_whole_answer_leaves_it_to_the_operator(whole):
    whole.answer(head(200, {**JSON, "Content-Length": "99"}), b"{")
    whole.forward.stop()
    assert outcome_of(whole.end()) == (Outcome.CLIENT_GONE, Reading(), 200)


def test_a_stop_after_the_end_changes_nothing(story):
    story.answer(STREAM, chunk(USED), chunk(DONE), LAST_CHUNK)
    story.forward.stop()
    assert outcome_of(story.end()) == (Outcome.COMPLETE, EXACT, 200)


# --- keep-alive ---------------------------------------------------------------------------------


def test_comments_go_out_until_the_first_token_comes(clock):
    story = Story(clock, keepalive_s=KEEPALIVE_S).begin()
    clock.advance(KEEPALIVE_S)
    assert story.server.sent == b""  # there is no answer yet that it could be part of
    story.answer(STREAM)
    clock.advance(KEEPALIVE_S - 1)
    assert story.shown == b""
    clock.advance(1)
    assert story.shown == KEEPALIVE
    story.answer(chunk(b": nothing yet\n\n"))
    clock.advance(KEEPALIVE_S)
    assert story.shown.count(KEEPALIVE) == 2
    story.answer(chunk(HEL))
    clock.advance(3 * KEEPALIVE_S)
    assert story.shown.count(KEEPALIVE) == 2
    story.answer(chunk(USED), chunk(DONE), LAST_CHUNK)
    story.end()


def test_comments_are_no_sign_of_life_of_the_backend(clock):
    story = Story(clock, keepalive_s=KEEPALIVE_S).begin().answer(STREAM)
    for _ in range(4):
        clock.advance(KEEPALIVE_S)
    assert story.end().outcome is Outcome.STALLED


def test_comments_never_split_an_event(clock):
    story = Story(clock, keepalive_s=KEEPALIVE_S).begin()
    story.answer(STREAM, chunk(HEL[:20]))
    clock.advance(KEEPALIVE_S)
    assert story.shown == KEEPALIVE
    story.answer(chunk(HEL[20:]))
    assert story.shown == KEEPALIVE + HEL
    story.forward.stop()
    story.end()


def test_comments_can_be_turned_off(story):
    story.answer(STREAM)
    story.clock.advance(SILENCE_S - 1)
    assert story.shown == b""
    story.forward.stop()
    story.end()


# --- a lease ----------------------------------------------------------------------------------


class Lender:
    """Lends a stream what it may pass on: 2 events at first, then what the test says."""

    def __init__(self) -> None:
        self.told: list[Counts] = []
        self.says: Deferred[int] = Deferred()

    async def more(self, counts: Counts) -> int:
        self.told.append(counts)
        return await self.says

    @property
    def lease(self) -> Lease:
        return Lease(2, self.more)


USED_UP = InsufficientQuota("used up")


@pytest.fixture
def lender() -> Lender:
    return Lender()


@pytest.fixture
def lent(clock: Clock, lender: Lender) -> Story:
    return Story(clock, lease=lender.lease).begin().answer(STREAM + chunk(HEL))


def test_a_stream_asks_at_the_end_of_its_lease_and_waits(lent, lender):
    assert lender.told == []
    lent.answer(chunk(LO))
    assert lender.told == [{Kind.COMPLETION: 2}]
    assert not lent.link.wire.is_reading
    lender.says.callback(2)
    assert lent.link.wire.is_reading
    lent.answer(chunk(HEL), chunk(USED), chunk(DONE) + LAST_CHUNK)
    assert lent.end().outcome is Outcome.COMPLETE
    assert len(lender.told) == 1


def test_a_client_that_catches_up_does_not_end_the_wait(lent, lender):
    lent.answer(chunk(LO))
    lent.down.pauseProducing()
    lent.down.resumeProducing()
    assert not lent.link.wire.is_reading
    lent.down.pauseProducing()
    lender.says.callback(9)
    assert not lent.link.wire.is_reading  # the client is slow now
    lent.down.resumeProducing()
    assert lent.link.wire.is_reading
    lent.answer(chunk(DONE) + LAST_CHUNK)
    lent.end()


def test_the_wait_is_no_silence_of_the_backend(lent, lender, clock):
    lent.answer(chunk(LO))
    clock.advance(2 * SILENCE_S)
    assert lent.is_running
    lender.says.callback(9)
    clock.advance(SILENCE_S)
    assert lent.end().outcome is Outcome.STALLED


def test_a_stream_without_another_lease_ends_with_what_it_was_told(lent, lender):
    lent.answer(chunk(LO))
    lender.says.errback(USED_UP)
    ending = lent.end()
    assert outcome_of(ending) == (Outcome.OUT_OF_BUDGET, RUNNING, 200)
    assert ending.last is USED_UP


def test_the_end_of_an_answer_needs_no_lease(lent, lender):
    lent.answer(chunk(LO) + chunk(USED) + chunk(DONE) + LAST_CHUNK)
    assert outcome_of(lent.end()) == (Outcome.COMPLETE, EXACT, 200)
    assert lender.told == []


def test_a_backend_that_ends_while_the_lease_is_waited_for_has_ended(lent, lender):
    lent.answer(chunk(LO))
    lent.link.close()
    assert lent.end().outcome is Outcome.TRUNCATED
    lender.says.errback(USED_UP)  # too late to matter


def test_a_client_that_leaves_while_the_lease_is_waited_for_is_drained_by_it(lent, lender):
    lent.answer(chunk(LO))
    lent.server.leave()
    assert not lent.link.wire.is_reading
    lender.says.callback(1)
    lender.says = Deferred()
    lent.answer(chunk(HEL))
    lender.says.errback(USED_UP)
    assert lent.end().outcome is Outcome.CLIENT_GONE
    assert len(lender.told) == 2


def test_a_fault_of_ours_in_a_lease_lets_the_stream_go_on(lent, lender, flush_logged_errors):
    lent.answer(chunk(LO))
    lender.says.errback(RuntimeError("a fault of ours"))
    assert lent.link.wire.is_reading
    lent.answer(chunk(HEL), chunk(USED), chunk(DONE) + LAST_CHUNK)
    assert lent.end().outcome is Outcome.COMPLETE
    assert len(flush_logged_errors(RuntimeError)) == 1
