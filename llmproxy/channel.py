"""HTTP/1.1 towards clients, on llhttp: one connection, its requests in order.

    bytes --> llhttp --> Message (header, body) --> Request, one at a time
                            \\--> those that came in one piece with it wait in a queue

What llhttp lets through, `framing.py` refuses. It must see each header's own bytes, so what is fed
never reaches from one request into the next.

States: idle, between requests; heading, a header is coming; serving, a request has not been
answered or its body has not come; closing, nothing is read any more. A deadline belongs to each
but serving: how long a request may take is for others to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NoReturn, cast

import httptools
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IPushProducer,
    ISSLTransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy import dialects, framing
from llmproxy.endpoints import Dialect
from llmproxy.errors import BadRequest, ProxyError, RequestTimeout
from llmproxy.ids import new_request_id
from llmproxy.upload import HIGH_WATER, Upload

if TYPE_CHECKING:
    from llmproxy.downstream import Producer
    from llmproxy.site import Request, Site

#: How long a connection may be silent between requests.
IDLE_TIMEOUT_S = 60.0
#: How long a header may take, from its first byte to its last.
HEADER_TIMEOUT_S = 10.0
#: How long a client may take what is buffered for it when its connection is to be closed.
LINGER_S = 15.0
#: How many connections are told at a time that there is no room for them, and for how long each;
#: more of them are cut off without a word.
MAX_REFUSED, REFUSED_S = 64, 1.0
#: How long the rest of what can't be parsed is read, so that its sender can read our answer.
DISCARD_S = 2.0
#: How many requests may come in one piece with the one before them. Nobody does so by accident.
MAX_PIPELINED = 64
#: In how many steps, each to a blank line, a body in chunks is parsed that came in one piece. What
#: comes after more of them, a next request's first line, would go unseen.
MAX_BLANK_LINES = 64
#: A body in chunks may have this much framing, and twice its own size; of the former, extensions
#: and trailer, no more than this in a row.
MAX_FRAMING = 32 * 1024
_BLANK_LINE = b"\r\n\r\n"


class Message:
    """A request as it is parsed; `refusal` when it can't be served."""

    __slots__ = ("body_bytes", "fields", "keep", "method", "refusal", "target", "upload", "version")

    def __init__(self) -> None:
        self.target = b""
        self.method = b""
        self.version = b"HTTP/1.1"
        self.fields: framing.Fields = {}
        self.keep = False
        self.refusal: ProxyError | None = None
        self.upload: Upload | None = None
        self.body_bytes = 0


@implementer(IPushProducer)
class Channel(Protocol):
    """One connection of a client."""

    def __init__(self, site: Site) -> None:
        self.site = site
        #: See `connections.Holder`.
        self.source: str | None = None
        #: Bytes to the client.
        self.send: Callable[[bytes], None] = lambda data: None
        self._wire: Any = None  # a TCP or TLS transport and producer
        self._parser: Any = httptools.HttpRequestParser(self)
        self._message: Message | None = None  # the one that is coming
        self._head = b""  # of its header, what has come
        self._raw_fields: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self._tail = b""  # the last bytes that were parsed, up to three
        self._left_bytes = 0  # of a body of known length
        self._chunked_bytes = 0  # of a body in chunks, with its framing
        self._framing_bytes = 0  # of these, the last ones in which was nothing but framing
        self._blind = False  # the piece that is parsed may reach into a next request
        self._problem: ProxyError | None = None  # why parsing ended
        self._queue: deque[Message] = deque()
        self._unread = b""  # what came after a request that is being served
        self.request: Request | None = None  # the one that is being served
        self._busy = False  # parsing or serving: neither begins anew from within
        self._retiring = False
        self._idle_s, self._parting = IDLE_TIMEOUT_S, False
        self._keep = True
        self._closing = self._gone = False
        self._held = self._congested = self._paused = False
        self._producer: Producer | None = None
        self._timer: IDelayedCall | None = None  # comes then, or before that
        self._due: Callable[[], None] | None = None  # what is to be done when it is too late
        self._due_at = 0.0

    # -- the connection ----------------------------------------------------------------------

    def connectionMade(self) -> None:
        """A client came."""
        self._wire = wire = cast(Any, self.transport)
        self.send = wire.write
        if hasattr(wire, "setTcpNoDelay"):
            wire.setTcpNoDelay(True)
        wire.registerProducer(self, True)
        self.site.joined(self)
        self._wait(IDLE_TIMEOUT_S, self.close)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It went."""
        self._gone = True
        self._wait_no_more()
        self._stop_timer()
        self._queue.clear()
        self._part_from_parser()
        self.site.left(self)
        request, self.request = self.request, None
        if request is not None:
            request.connectionLost()

    @property
    def is_idle(self) -> bool:
        """Nothing has been asked that waits for an answer."""
        return self.request is None and not self._queue

    def retire(self) -> None:
        """Close after the answer that is due, or now if none is."""
        self._retiring = True
        if self.is_idle:
            self.close()

    def part(self, idle_s: float) -> None:
        """Close after the next answer that can say so, or when nothing is asked for `idle_s`.

        A client that is told has sent no request that would be lost with the connection.
        """
        self._idle_s, self._parting = idle_s, True
        if self.request is not None and not self.request.started:
            self._keep = False
        elif self._due == self.close:
            self._wait(idle_s, self.close)

    def close(self, linger_s: float = LINGER_S) -> None:
        """Close once all is sent; a client that does not take it within `linger_s` is cut off."""
        if self._gone:
            return
        if not self._closing or linger_s != LINGER_S:
            self._wait(linger_s, self.abort)
        self._closing = True
        self._wire.unregisterProducer()
        self._wire.loseConnection()

    def abort(self) -> None:
        """Cut the client off now."""
        self._wait_no_more()
        self._closing = True
        if not self._gone:
            self._wire.abortConnection()

    # -- deadlines ---------------------------------------------------------------------------

    def _wait(self, seconds: float, act: Callable[[], None]) -> None:
        """Do `act` then, in the place of what was waited for."""
        clock, timer = self.site.clock, self._timer
        self._due, self._due_at = act, clock.seconds() + seconds
        if timer is None or timer.getTime() > self._due_at:
            self._stop_timer()
            self._timer = clock.callLater(seconds, self._time_passed)

    def _wait_no_more(self) -> None:
        """The timer goes on: most often the same is waited for again before it comes."""
        self._due = None

    def _time_passed(self) -> None:
        due, self._timer = self._due, None
        if due is None:
            return
        left = self._due_at - self.site.clock.seconds()
        if left > 0:
            self._timer = self.site.clock.callLater(left, self._time_passed)
        else:
            self._due = None
            due()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _header_too_slow(self) -> None:
        self._refuse(RequestTimeout("The request's header did not arrive in time."))

    # -- what comes --------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._closing or self._gone or self._problem is not None:
            return
        if self.request is not None and self._message is None:
            self._unread += data
            self._read_or_not()
            return
        self._parse(data)
        self._serve()

    def _parse(self, data: bytes) -> None:
        self._busy = True
        try:
            self._feed(data)
        except httptools.HttpParserUpgrade:
            pass  # it was refused with its header, and nothing after it is a request
        except Exception:  # llhttp's, and those of the callbacks below
            self._broken(self._problem or BadRequest("The request is not valid HTTP/1.1."))
        else:
            self._parsed()
        finally:
            self._busy = False
            self._part_from_parser()

    def _feed(self, data: bytes) -> None:
        """Have it parsed: a header, a body, the next header, each on its own."""
        at, size, lines = 0, len(data), 0
        self._blind = False
        feed = self._parser.feed_data
        while at < size:
            message = self._message
            upload = None if message is None else message.upload
            if upload is None:
                part = self._up_to_blank_line(data, at)
                self._head = self._head + part if self._head else part
            elif upload.length is not None:
                part = data[at : at + self._left_bytes]
                self._left_bytes -= len(part)
            else:  # its end is a blank line, though not every blank line is its end
                lines += 1
                self._blind = lines > MAX_BLANK_LINES
                part = data[at:] if self._blind else self._up_to_blank_line(data, at)
                self._chunked_bytes += len(part)
                self._framing_bytes += len(part)
            at += len(part)
            feed(part)

    def _up_to_blank_line(self, data: bytes, at: int) -> bytes:
        """What is in `data` from `at` on to the end of a blank line, or all."""
        tail = self._tail
        if tail and (seam := (tail + data[at : at + 3]).find(_BLANK_LINE)) >= 0:
            end = at + seam + len(_BLANK_LINE) - len(tail)
        elif (found := data.find(_BLANK_LINE, at)) >= 0:
            end = found + len(_BLANK_LINE)
        else:
            self._tail = (tail + data[at:])[-3:]
            return data[at:]
        self._tail = b""
        return data[at:end]

    def _part_from_parser(self) -> None:
        """They know each other: else only the garbage collector would end a connection."""
        if self._gone and not self._busy:
            self._parser = None

    def _parsed(self) -> None:
        message = self._message
        if message is None:
            if self._head:
                self._between()
            elif self.request is not None:
                self._wait_no_more()
        elif message.upload is None:
            self._heading()
        else:
            self._body_goes_on(message, message.upload)

    def _between(self) -> None:
        """No request has begun but for an empty line, which may come before it."""
        if not b"\r\n".startswith(self._head):
            self._broken(framing.bad_line())

    def _heading(self) -> None:
        """A header has begun, and is not complete: its size and time have bounds."""
        problem = framing.problem_so_far(self._head)
        if problem is not None:
            self._broken(problem)
        elif self._due != self._header_too_slow:
            self._wait(HEADER_TIMEOUT_S, self._header_too_slow)

    def _body_goes_on(self, message: Message, upload: Upload) -> None:
        self._framing_bytes = 0 if self._parts else self._framing_bytes
        self._hand_over(message, upload)
        if self._has_too_much_framing(message) or self._framing_bytes > MAX_FRAMING:
            self._broken(_too_much_framing())

    def _has_too_much_framing(self, message: Message) -> bool:
        return self._chunked_bytes > MAX_FRAMING + 3 * message.body_bytes

    def _broken(self, problem: ProxyError) -> None:
        """The bytes make no sense from here on; what came before them is still served."""
        self._problem = problem
        message, self._message = self._message, None
        if message is not None and message in self._queue:
            self._queue.remove(message)
        elif message is not None and message.upload is not None:
            self._refuse(problem)  # its body is what makes no sense

    def _stop(self, problem: ProxyError) -> NoReturn:
        """Parse no further, from within the parser."""
        self._problem = problem
        raise problem

    # -- as llhttp tells it ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._blind or len(self._queue) >= MAX_PIPELINED:
            self._stop(BadRequest("Too many requests at once."))
        self._message = Message()
        self._raw_fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the header, or of the trailer, which nobody reads."""
        self._raw_fields.append((name, value))

    def on_headers_complete(self) -> None:
        """The header is complete."""
        message = self._message
        assert message is not None
        head, raw_fields = self._head, self._raw_fields
        self._head, self._raw_fields = b"", []
        if len(head) > framing.MAX_HEADER or len(raw_fields) > framing.MAX_FIELDS:
            self._stop(framing.problem_so_far(head) or framing.too_large())
        line = framing.first_line(head)
        if line is None:
            self._stop(framing.bad_line())
        method, target, version = message.method, message.target, message.version = line
        message.fields = fields = framing.combined(raw_fields)
        message.keep = version == b"HTTP/1.1" and self._parser.should_keep_alive()
        try:
            framing.check(method, target, version, fields)
        except ProxyError as error:
            message.refusal = error
        length = None if b"transfer-encoding" in fields else int(fields.get(b"content-length", 0))
        self._left_bytes = length or 0
        self._chunked_bytes = self._framing_bytes = 0
        message.upload = Upload(length, self.site.clock, self)
        self._queue.append(message)

    def on_body(self, data: bytes) -> None:
        """A part of the body, without its framing."""
        self._parts.append(data)

    def on_message_complete(self) -> None:
        """The request is whole."""
        message = self._message
        assert message is not None
        assert message.upload is not None
        self._hand_over(message, message.upload)
        if self._raw_fields and not framing.may_trail(self._raw_fields):
            self._stop(framing.bad_trailer())
        if self._chunked_bytes and self._has_too_much_framing(message):
            self._stop(_too_much_framing())
        self._message = None
        message.upload.ended()

    def _hand_over(self, message: Message, upload: Upload) -> None:
        parts = self._parts
        if parts:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            message.body_bytes += len(data)
            upload.received(data)

    # -- what is served ----------------------------------------------------------------------

    def _serve(self) -> None:
        """Serve what has come, in order, until one takes its time."""
        if self._busy:  # an answer was given at once: who began this goes on
            return
        while self.request is None and not self._closing and not self._gone:
            if self._queue:
                self._begin(self._queue.popleft())
            elif self._problem is not None:
                self._refuse(self._problem)
            elif self._unread:
                unread, self._unread = self._unread, b""
                self._parse(unread)
            else:
                break
        self._read_or_not()

    def _begin(self, message: Message) -> None:
        if message.refusal is not None:
            self._refuse(message.refusal)
            return
        self._wait_no_more()
        self.site.room.resting.pop(self, None)
        self._keep = message.keep and not self._parting
        self.request = request = self.site.new_request(self, message)
        self._busy = True
        try:
            request.process()
        finally:
            self._busy = False

    @property
    def keep(self) -> bool:
        """Whether the connection will serve another request after this one."""
        return self._keep and not self._retiring

    @property
    def peer(self) -> IAddress:
        """The client's address; the transport makes it when it is asked."""
        address: IAddress = self._wire.getPeer()
        return address

    def done(self) -> None:
        """The answer is out, and the request whole."""
        self.request = None
        if self._gone:
            return
        if not self.keep:
            self.close()
            return
        if not self._queue and not self._unread and self._problem is None:
            self.site.room.resting[self] = None
            self._wait(self._idle_s, self.close)
        self._serve()

    def _refuse(self, error: ProxyError) -> None:
        """Answer what is no request, in the most common dialect, and close.

        What its sender has still to say is read for a while: closing at once would reset the
        connection, and take our answer away.
        """
        if self._closing:
            return
        request = self.request
        self._closing = True
        if request is None or not request.started:
            self.send(self.site.malformed(error, request))
        self._wait(DISCARD_S, self.abort)
        self.request = None
        if request is not None:
            request.connectionLost()
        transport = self._wire
        transport.unregisterProducer()
        if ISSLTransport.providedBy(transport) or not hasattr(transport, "loseWriteConnection"):
            transport.loseConnection()
        else:
            transport.loseWriteConnection()
            transport.resumeProducing()

    # -- what the request asks of its connection ----------------------------------------------

    def invite_body(self) -> None:
        """Tell a client that waits for it to send its body (RFC 9110 section 10.1.1)."""
        request = self.request
        if request is None or request.started or request.version != b"HTTP/1.1":
            return
        if request.fields.pop(b"expect", b""):
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def hold_up(self, hold: bool) -> None:
        """Stop reading the client's body, or go on."""
        self._held = hold
        self._read_or_not()

    def _read_or_not(self) -> None:
        pause = self._held or self._congested
        if self.request is not None and not pause:
            pause = bool(self._queue) or len(self._unread) > HIGH_WATER
        if pause != self._paused and not self._gone and not self._closing:
            self._paused = pause
            if pause:
                self._wire.pauseProducing()
            else:
                self._wire.resumeProducing()

    def attach(self, producer: Producer) -> None:
        """Let the client's speed govern `producer`."""
        self._producer = producer
        if self._congested:
            producer.pauseProducing()

    def detach(self) -> None:
        """It has nothing more."""
        self._producer = None

    def pauseProducing(self) -> None:
        """The client does not take what is sent: nothing more is made, nor asked for."""
        self._congested = True
        if self._producer is not None:
            self._producer.pauseProducing()
        self._read_or_not()

    def resumeProducing(self) -> None:
        """It has caught up."""
        self._congested = False
        if self._producer is not None:
            self._producer.resumeProducing()
        self._read_or_not()

    def stopProducing(self) -> None:
        """The transport is gone; `connectionLost` does what is to be done."""


class Refused(Protocol):
    """A connection that there is no room for: it is told so, whatever it wants to say."""

    def __init__(self, site: Site, error: ProxyError) -> None:
        self._site, self._error = site, error
        self._timer: IDelayedCall | None = None

    def connectionMade(self) -> None:
        """Answer, if that takes no handshake first."""
        wire = cast(Any, self.transport)
        refused = self._site.refused
        if len(refused) >= MAX_REFUSED or ISSLTransport.providedBy(wire):
            wire.abortConnection()
            return
        refused.add(self)
        self._timer = self._site.clock.callLater(REFUSED_S, self.abort)
        wire.write(refusal_answer(self._error, new_request_id()))
        wire.loseWriteConnection()

    def abort(self) -> None:
        """Cut it off now."""
        self._stop_waiting()
        cast(Any, self.transport).abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It went."""
        self._stop_waiting()
        self._site.refused.discard(self)

    def _stop_waiting(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()


def refusal_answer(error: ProxyError, rid: str) -> bytes:
    """The answer to what is no request, in the most common dialect."""
    reason = HTTPStatus(error.status).phrase.encode()
    more = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items()).encode()
    body = dialects.error_body(Dialect.OPENAI, error)
    return (
        b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nX-Request-Id: %b\r\n%b"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (error.status, reason, rid.encode(), more, len(body), body)
    )


def _too_much_framing() -> ProxyError:
    return BadRequest("The request's body has more framing than content.")
