"""The list of what is forwarded: method, path, dialect, and how its answers are metered.

Nothing that is not in this table reaches a backend.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Dialect(enum.StrEnum):
    """Whose error shape the clients of a path understand."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Shape(enum.StrEnum):
    """Where the usage stands in an answer."""

    CHAT = "chat"  # chat and legacy completions
    MESSAGES = "messages"  # Anthropic messages
    RESPONSES = "responses"  # OpenAI responses
    EMBEDDING = "embedding"  # embeddings, rerank, score
    AUDIO = "audio"  # transcriptions, translations
    FREE = "free"  # nothing is billed (count_tokens)


class Body(enum.StrEnum):
    """What a request carries."""

    JSON = "json"
    MULTIPART = "multipart"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A forwarded path."""

    path: str
    shape: Shape
    dialect: Dialect = Dialect.OPENAI
    body: Body = Body.JSON
    streams: bool = False


ENDPOINTS = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/v1/chat/completions", Shape.CHAT, streams=True),
        Endpoint("/v1/completions", Shape.CHAT, streams=True),
        Endpoint("/v1/embeddings", Shape.EMBEDDING),
        Endpoint("/v1/messages", Shape.MESSAGES, Dialect.ANTHROPIC, streams=True),
        Endpoint("/v1/messages/count_tokens", Shape.FREE, Dialect.ANTHROPIC),
        Endpoint("/v1/responses", Shape.RESPONSES, streams=True),
        Endpoint("/v1/audio/transcriptions", Shape.AUDIO, body=Body.MULTIPART),
        Endpoint("/v1/audio/translations", Shape.AUDIO, body=Body.MULTIPART),
        Endpoint("/v1/rerank", Shape.EMBEDDING),
        Endpoint("/v1/score", Shape.EMBEDDING),
    )
}
