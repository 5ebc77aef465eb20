"""What a client is told of a backend's answer that is not a result. Pure.

Our own credentials and the backend's inner troubles are ours to mend, and no client's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmproxy.errors import BackendError, BadRequest, ProxyError

#: How servers say that a prompt is too long, when they say it with a 5xx (lower case).
CONTEXT_PHRASES = (
    b"context length",
    b"context_length",
    b"maximum context",
    b"context size",
    b"context window",
    b"prompt is too long",
)
#: Refusals that speak of our credentials and our account, not of the client's.
OUR_CREDENTIALS = (401, 402, 403)
#: A shorter token is a placeholder (`none`, `EMPTY`) and no secret: it may stand in any text.
MIN_SECRET = 12


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, ready for the client."""

    status: int
    body: bytes
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)


def refusal(
    status: int, body: bytes, fields: list[tuple[bytes, bytes]], token: str | None = None
) -> Answer | ProxyError:
    """What the client is told when a backend answered with `status`, which is not 200.

    fields: the header fields that may go on to the client. token: ours for this backend.
    """
    ours = status in OUR_CREDENTIALS or _quotes(body, token)
    if 400 <= status < 500 and not ours:
        return Answer(status, body, fields)
    if status >= 500 and any(phrase in body.lower() for phrase in CONTEXT_PHRASES):
        return BadRequest(
            "The request is longer than the model's context.",
            code="context_length_exceeded",
            param="messages",
        )
    return BackendError("The model's server failed to answer.")


def _quotes(body: bytes, token: str | None) -> bool:
    """Some servers tell in an error what they were sent, with its header."""
    return token is not None and len(token) >= MIN_SECRET and token.encode() in body
