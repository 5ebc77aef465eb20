"""An audio upload on its way: from the client's form to the backend's, never whole in memory."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IConsumer, IReactorTime
from twisted.python.failure import Failure
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from llmproxy.audio import FormRewriter
from llmproxy.errors import BackendTimeout
from llmproxy.upload import HIGH_WATER, Upload, too_large


@implementer(IBodyProducer)
class Form:
    """Pulls the client's form, rewrites it, and pushes it to the backend at the backend's pace.

    The client's model is known only once its field has come, so reading begins before there is a
    backend: `model()` reads that far, `start()` names the backend's model, then it is a body.
    """

    length = UNKNOWN_LENGTH

    def __init__(
        self,
        upload: Upload,
        boundary: bytes,
        clock: IReactorTime,
        *,
        hold_limit: int,
        max_size: int,
        timeout_s: float,
    ) -> None:
        self.on_sent: Callable[[], None] = lambda: None
        self.content_type = b'multipart/form-data; boundary="' + boundary + b'"'
        self._upload = upload
        self._rewriter = FormRewriter(boundary, hold_limit=hold_limit)
        self._max_size = max_size
        self._timeout_s = timeout_s
        self._clock = clock
        self._patience_s = timeout_s
        self._size = 0
        self._ready = b""
        self._named: str | None = None  # the model's name in it
        self._gate: Deferred[None] | None = None
        self._sent: Deferred[None] = Deferred()
        self._pump: Deferred[None] | None = None
        self._stopped = False

    @property
    def response_format(self) -> str | None:
        """What the client wants; known when the form is whole."""
        return self._rewriter.response_format

    async def model(self) -> str:
        """The model that the client named. Raises BadRequest, BodyTooLarge, ClientGone."""
        while self._rewriter.model is None:
            data = await self._next()
            if data is None:
                self._ready += self._rewriter.finish()  # says what is missing
                break
            self._ready += self._rewriter.feed(data)
        return self._rewriter.model or ""

    def start(self, backend_model: str, patience_s: float) -> bool:
        """The backend's name for the model, and how long it may take no more in mid-form.

        False: it can't go there any more, since another backend has got some of it, or another
        name is in it.
        """
        if self._named is not None:
            return self._named == backend_model and self._pump is None
        self._named = backend_model
        self._patience_s = patience_s
        self._ready += self._rewriter.start(backend_model)
        return True

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """See `IBodyProducer.startProducing`."""
        self._pump = Deferred.fromCoroutine(self._run(consumer))
        self._pump.addCallbacks(self._sent.callback, self._broke)
        return self._sent

    async def _run(self, consumer: IConsumer) -> None:
        ready, self._ready = self._ready, b""
        for start in range(0, len(ready), HIGH_WATER):
            await self._write(consumer, ready[start : start + HIGH_WATER])
        while (data := await self._next()) is not None:
            await self._write(consumer, self._rewriter.feed(data))
        consumer.write(self._rewriter.finish())
        self.on_sent()

    async def _write(self, consumer: IConsumer, data: bytes) -> None:
        if data:  # an empty chunk would be the end of the body
            consumer.write(data)
        if self._gate is not None:
            await self._opening(self._gate)

    async def _opening(self, gate: Deferred[None]) -> None:
        # A held-up client can't even be seen to leave, so nothing else would end this.
        try:
            await gate.addTimeout(self._patience_s, self._clock)
        except DeferTimeoutError:
            raise BackendTimeout("The model's server did not take the request in time.") from None

    async def _next(self) -> bytes | None:
        data = await self._upload.next(self._timeout_s)
        self._size += len(data or b"")
        if self._size > self._max_size:
            raise too_large(self._max_size)
        return data

    def _broke(self, failure: Failure) -> None:
        if not self._stopped:  # a stopped producer says nothing any more
            self._sent.errback(failure)

    def pauseProducing(self) -> None:
        """The backend is slower than the client."""
        if self._gate is None:
            self._gate = Deferred()

    def resumeProducing(self) -> None:
        """The backend takes more."""
        gate, self._gate = self._gate, None
        if gate is not None and not gate.called:
            gate.callback(None)

    def stopProducing(self) -> None:
        """The backend takes no more."""
        self._stopped = True
        if self._pump is not None:
            self._pump.cancel()
