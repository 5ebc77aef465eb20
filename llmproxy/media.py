"""URLs in a request's content that its backend would fetch, from inside its network. Pure.

The forms are those of chat (vLLM, SGLang, llama.cpp), responses, messages, embeddings, rerank and
score. What only looks like one is left alone: text, the schemas of tools and what they are called
with, metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmproxy.endpoints import Endpoint, Shape

# Where content may stand in a body.
_CONTENT = frozenset(["messages", "input", "system", "instructions"])
_TEXTS = frozenset(
    [*_CONTENT, "documents", "query", "queries", "items", "text_1", "text_2", "data_1", "data_2"]
)
# Where in content there is more of it.
_WITHIN = frozenset(["content", "output", "source", "file"])
# What is fetched, or has a `url` that is: chat (vLLM, SGLang, llama.cpp), responses, messages
# (`source`), and the embeddings of SGLang and others (`image`).
_MEDIA = frozenset(
    [
        *("image_url", "audio_url", "video_url", "file_url", "file_data"),
        *("image", "audio", "video", "images", "audios", "videos"),
    ]
)
# Lists whose items may be of several types.
_MIXED = frozenset(["messages", "content"])
# Servers of tools, in the dialects of responses and of messages.
_TOOLS = {"tools": "server_url", "mcp_servers": "url"}
_LOOKED_INTO = _MEDIA | _WITHIN
_HAS_URL = _MEDIA | {"source", "file"}
_FETCHED = _MEDIA | {f"{name}.url" for name in _HAS_URL}
_ROOTS, _TEXT_ROOTS = _CONTENT | _MEDIA, _TEXTS | _MEDIA

#: Fields of a body that are looked into.
NAMES = _TEXT_ROOTS.union(_TOOLS)

# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_EMBEDDING = Shape.EMBEDDING


def remote_url(endpoint: Endpoint, body: Mapping[str, Any]) -> str | None:
    """The name of a field that would have the backend fetch something, None if there is none.

    That is any text but a `data:` URL where a medium's URL belongs (SGLang takes paths, too), and
    the URL of a server of tools.
    """
    roots = _TEXT_ROOTS if endpoint.shape is _EMBEDDING else _ROOTS
    waiting = [(name, [value]) for name, value in body.items() if name in roots]
    while waiting:
        name, values = waiting.pop()
        is_fetched = name in _FETCHED
        for value in values:
            kind = type(value)
            if kind is str:
                if is_fetched and _is_remote(name, value):
                    return name
            elif kind is dict:
                # Most messages are like this: to know it saves half of the time.
                is_plain = len(value) == 2 and "role" in value and type(value.get("content")) is str
                if not is_plain:
                    waiting += _fields(name, value)
            elif kind is list and not _is_tokens(name, value):
                waiting.append((name, value))
    return None if _TOOLS.keys().isdisjoint(body) else _tool_server(body)


def _is_tokens(name: str, values: list[Any]) -> bool:
    return bool(values) and type(values[0]) is int and name not in _MIXED


def _fields(parent: str, part: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    found = []
    for key, value in part.items():
        name = key.casefold()  # servers in Go take any case
        if name in _LOOKED_INTO:
            found.append((name, [value]))
        elif name == "url" and parent in _HAS_URL:
            found.append((f"{parent}.url", [value]))
    return found


def _is_remote(name: str, value: str) -> bool:
    if name == "file_data" and ":" not in value[:64]:
        return False  # base64 as it is
    return not value.startswith("data:")


def _tool_server(body: Mapping[str, Any]) -> str | None:
    for name, key in _TOOLS.items():
        listed = body.get(name)
        for tool in listed if isinstance(listed, list) else [listed]:
            if type(tool) is dict and tool.get(key) is not None:
                return f"{name}.{key}"
    return None
