"""What processes of ours tell each other: the messages of `control.py`, over pipes or a socket."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from llmproxy.control import Decoder, Message, encode


class Link(Protocol):
    """The other process, as this one sees it. `gone` fires when it can't be told anything more."""

    def __init__(self, heard: Callable[[Message], None]) -> None:
        self.gone: Deferred[None] = Deferred()
        self._heard = heard
        self._decoder = Decoder()

    def send(self, kind: str, **content: object) -> None:
        """Tell it something."""
        if self.transport is not None:
            self.transport.write(encode(kind, **content))

    def dataReceived(self, data: bytes) -> None:
        """It says something."""
        for message in self._decoder.feed(data):
            self._heard(message)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It is gone, or we have closed."""
        self.transport = None
        self.gone.callback(None)
