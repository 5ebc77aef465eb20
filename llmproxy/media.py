"""URLs in a request's content that its backend would fetch, from inside its network. Pure.

The forms are those of chat (vLLM, SGLang, llama.cpp), responses, messages, embeddings, rerank and
score. What only looks like one is left alone: text, the schemas of tools and what they are called
with, metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmproxy.endpoints import Endpoint, Shape
from llmproxy.jsonbytes import are_numbers

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
# Servers of tools, in the dialects of responses and of messages.
_TOOLS = {"tools": "server_url", "mcp_servers": "url"}
_TOOL_LISTS = frozenset(_TOOLS)
_LOOKED_INTO = _MEDIA | _WITHIN
_HAS_URL = _MEDIA | {"source", "file"}
_FETCHED = _MEDIA | {f"{name}.url" for name in _HAS_URL}
_ROOTS, _TEXT_ROOTS = _CONTENT | _MEDIA, _TEXTS | _MEDIA

#: Fields of a body that are looked into.
NAMES = _TEXT_ROOTS | _TOOL_LISTS

# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_EMBEDDING = Shape.EMBEDDING


def remote_url(endpoint: Endpoint, body: Mapping[str, Any]) -> str | None:
    """The name of a field that would have the backend fetch something, None if there is none.

    That is any text but a `data:` URL where a medium's URL belongs (SGLang takes paths, too), and
    the URL of a server of tools.
    """
    roots = _roots(endpoint)
    found = _fetched(
        [
            (name, value if type(value) is list else [value])
            for name, value in body.items()
            if name in roots
        ]
    )
    if found is not None or _TOOL_LISTS.isdisjoint(body):
        return found
    return _tool_server(body)


def in_part(medium: str | None, value: list[Any] | dict[str, Any]) -> str | None:
    """The same in a part of what is `medium`: some of its items, or some of its members."""
    if medium is None:
        return None
    if medium in _TOOLS:
        return _tool_server({medium: value})
    if isinstance(value, dict):
        return _fetched(_fields(medium, value))
    return None if are_numbers(value) else _fetched([(medium, value)])


def at_top(endpoint: Endpoint, name: str) -> str | None:
    """What a member of a body is as a medium, or has media in it; None if it is nothing such."""
    return name if name in _roots(endpoint) or name in _TOOLS else None


def within(medium: str | None, name: str) -> str | None:
    """The same of a member of an object that is `medium`."""
    key = name.casefold()  # servers in Go take any case
    if medium is None or medium in _TOOLS:
        return None
    if key in _LOOKED_INTO:
        return key
    return f"{medium}.url" if key == "url" and medium in _HAS_URL else None


def _roots(endpoint: Endpoint) -> frozenset[str]:
    return _TEXT_ROOTS if endpoint.shape is _EMBEDDING else _ROOTS


def _fetched(waiting: list[tuple[str, list[Any]]]) -> str | None:
    while waiting:
        name, values = waiting.pop()
        if values and type(values[0]) is int and are_numbers(values):
            continue
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
            elif kind is list:
                waiting.append((name, value))
    return None


def _fields(parent: str, part: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    found = []
    for key, value in part.items():
        name = within(parent, key)
        if name is not None:
            found.append((name, [value]))
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
