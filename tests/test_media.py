"""URLs that a backend would fetch: found in every form that servers take, and nowhere else.

The forms are those of OpenAI's and Anthropic's API references (chat, responses, messages), of the
requests' classes in vLLM 0.33 and SGLang 0.5.23, and of llama.cpp's server.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import orjson
import pytest
from surveys import SIZES, surveyed

from llmproxy import parts
from llmproxy.endpoints import ENDPOINTS
from llmproxy.media import remote_url

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
EMBEDDINGS = "/v1/embeddings"
RERANK = "/v1/rerank"
SCORE = "/v1/score"
DATA = "data:image/png;base64,iVBORw0KGgo="


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, *parts]}]}


def item(*parts: Any) -> dict[str, Any]:
    return {"input": [{"type": "message", "role": "user", "content": list(parts)}]}


def result(part: Any) -> dict[str, Any]:
    """A tool's result in messages."""
    return user({"type": "tool_result", "tool_use_id": "t", "content": [part]})


def found(path: str, body: dict[str, Any]) -> str | None:
    """What is found in a body; it is the same in its parts, of whatever size they are."""
    endpoint = ENDPOINTS[path]
    name = remote_url(endpoint, body)
    for run, block in SIZES:
        with patch.multiple(parts, RUN=run, BLOCK=block):
            assert surveyed(endpoint, orjson.dumps(body)).remote_url == name
    return name


URL = "@"  # where the URL goes

FORMS: list[tuple[str, dict[str, Any], str]] = [
    *(
        (CHAT, user({"type": name, name: value}), found)
        for name in ("image_url", "audio_url", "video_url")
        for value, found in (({"url": URL}, f"{name}.url"), (URL, name))
    ),
    (CHAT, user({"image_url": URL}), "image_url"),
    (CHAT, user({"image_url": {"url": URL, "detail": "low"}, "uuid": "u"}), "image_url.url"),
    (CHAT, user({"type": "input_image", "image_url": URL}), "image_url"),
    (CHAT, user({"type": "image", "image": URL}), "image"),
    (CHAT, user({"type": "file", "file": {"file_data": URL}}), "file_data"),
    (CHAT, user({"type": "file", "file": {"url": URL}}), "file.url"),
    (CHAT, user({"type": "file", "file": {"file_url": URL}}), "file_url"),
    (CHAT, user({"Type": "image_url", "Image_URL": {"URL": URL}}), "image_url.url"),
    (CHAT, {"messages": [{"role": "user", "content": {"image_url": URL}}]}, "image_url"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "images": [DATA, URL]}]}, "images"),
    (CHAT, {"messages": [{"role": "x", "image_url": URL}]}, "image_url"),
    (CHAT, {"messages": [{"content": "x", "Content": [{"image_url": URL}]}]}, "image_url"),
    (CHAT, {"messages": [1, ["role", {"image_url": URL}]]}, "image_url"),
    (CHAT, {"messages": [], "image": URL}, "image"),
    (RESPONSES, item({"type": "input_image", "image_url": URL}), "image_url"),
    (RESPONSES, item({"type": "input_image", "image_url": {"url": URL}}), "image_url.url"),
    (RESPONSES, item({"type": "input_file", "file_url": URL}), "file_url"),
    (RESPONSES, item({"type": "input_file", "filename": "a", "file_data": URL}), "file_data"),
    (
        RESPONSES,
        {"input": [{"type": "computer_call_output", "output": {"image_url": URL}}]},
        "image_url",
    ),
    (
        RESPONSES,
        {"input": [{"type": "function_call_output", "output": [{"image_url": URL}]}]},
        "image_url",
    ),
    (RESPONSES, {"instructions": item({"image_url": URL})["input"], "input": "x"}, "image_url"),
    (MESSAGES, user({"type": "image", "source": {"type": "url", "url": URL}}), "source.url"),
    (MESSAGES, user({"type": "image", "source": {"type": "base64", "url": URL}}), "source.url"),
    (MESSAGES, user({"type": "document", "source": {"type": "url", "url": URL}}), "source.url"),
    (
        MESSAGES,
        user(
            {
                "type": "document",
                "source": {
                    "type": "content",
                    "content": [{"type": "image", "source": {"type": "url", "url": URL}}],
                },
            }
        ),
        "source.url",
    ),
    (MESSAGES, result({"type": "image", "source": {"type": "url", "url": URL}}), "source.url"),
    (
        MESSAGES,
        {"system": [{"type": "image", "source": {"type": "url", "url": URL}}], "messages": []},
        "source.url",
    ),
    (EMBEDDINGS, user({"type": "image_url", "image_url": {"url": URL}}), "image_url.url"),
    (EMBEDDINGS, {"messages": [user({"image_url": URL})["messages"]]}, "image_url"),
    (EMBEDDINGS, {"input": user({"image_url": URL})["messages"]}, "image_url"),
    (EMBEDDINGS, {"input": ["text", {"text": "x", "image": URL}]}, "image"),
    (EMBEDDINGS, {"input": [{"video": URL}]}, "video"),
    (EMBEDDINGS, {"images": [URL]}, "images"),
    (RERANK, {"query": "q", "documents": ["a", {"content": [{"image_url": URL}]}]}, "image_url"),
    (RERANK, {"query": {"content": [{"image_url": URL}]}, "documents": ["a"]}, "image_url"),
    (RERANK, {"query": "q", "documents": [[{"video_url": {"url": URL}}]]}, "video_url.url"),
    *(
        (SCORE, {name: {"content": [{"image_url": {"url": URL}}]}}, "image_url.url")
        for name in ("text_1", "text_2", "data_1", "data_2", "queries", "documents", "items")
    ),
]


def filled(form: Any, url: str) -> Any:
    if isinstance(form, dict):
        return {key: filled(value, url) for key, value in form.items()}
    if isinstance(form, list):
        return [filled(value, url) for value in form]
    return url if form == URL else form


REMOTE = [
    "http://169.254.169.254/latest/meta-data/",
    "https://example.org/cat.png",
    "HTTPS://example.org/",
    "file:///etc/passwd",
    "ftp://a/b",
    "s3://bucket/key",
    " data:image/png;base64,AA==",
    "x:data:",
]
# What is no URL may still be taken as one, or as a path.
ODD = ["//example.org/cat.png", "/etc/passwd.png", "\\\\host\\share", "example.org/cat.png"]


@pytest.mark.parametrize(("path", "form", "name"), FORMS)
def test_a_remote_url_is_found_by_the_name_of_its_field(path, form, name):
    for url in REMOTE + (ODD if name != "file_data" else []):
        assert found(path, filled(form, url)) == name, url


@pytest.mark.parametrize(("path", "form", "name"), FORMS)
def test_content_in_the_request_itself_passes(path, form, name):
    assert found(path, filled(form, DATA)) is None
    assert found(path, filled(form, "data:,")) is None


def test_escapes_in_names_hide_nothing():
    part = b'{"im\\u0061ge_url":{"\\u0075rl":"http:\\/\\/a"}}'
    body = orjson.loads(b'{"messages":[{"role":"user","content":[%b]}]}' % part)
    assert found(CHAT, body) == "image_url.url"


def test_the_servers_of_tools_are_found():
    mcp = {"type": "mcp", "server_label": "x", "server_url": "https://example.org/mcp"}
    told = found(RESPONSES, {"input": "x", "tools": [{"type": "function"}, mcp]})
    assert told == "tools.server_url"
    told = found(MESSAGES, {"mcp_servers": [{"type": "url", "url": "https://a"}]})
    assert told == "mcp_servers.url"


def test_many_things_before_it_hide_nothing():
    image = {"image_url": {"url": "http://a"}}
    text = {"type": "text", "text": "x"}
    many: list[list[Any]] = [[1] * 5000, ["x" * 99] * 500, [[]] * 5000, [text] * 500]
    for before in many:
        assert found(CHAT, {"messages": [*before, image]}) == "image_url.url"
        assert found(RESPONSES, {"input": [*before, {"content": [*before, image]}]}) is not None
        assert found(RESPONSES, {"tools": [*before, {"server_url": "http://a"}]}) is not None


LINK = "https://example.org/a.png"
SCHEMA = {
    "type": "object",
    "properties": {
        "url": {"type": "string", "default": LINK},
        "image_url": {"type": "string", "examples": [LINK]},
        "source": {"url": LINK},
        "server_url": {"type": "string"},
    },
}

HARMLESS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [{"role": "user", "content": f"What is at {LINK}?"}]}),
    (CHAT, user({"type": "text", "text": LINK})),
    (CHAT, user(LINK)),
    (CHAT, {"messages": [], "tools": [{"function": {"name": "get", "parameters": SCHEMA}}]}),
    (CHAT, {"messages": [], "functions": [{"name": "get", "parameters": SCHEMA}]}),
    (CHAT, {"messages": [], "response_format": {"json_schema": {"schema": SCHEMA}}}),
    (CHAT, {"messages": [], "metadata": {"image_url": LINK, "url": LINK}, "user": LINK}),
    (
        CHAT,
        {
            "messages": [
                {"role": "assistant", "content": None, "audio": {"id": "audio_1"}},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"function": {"name": "f", "arguments": f'{{"image_url":"{LINK}"}}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": f'{{"url":"{LINK}"}}'},
                {"role": "assistant", "annotations": [{"url_citation": {"url": LINK}}]},
            ]
        },
    ),
    (CHAT, user({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}})),
    (CHAT, user({"type": "file", "file": {"file_data": "JVBERi0xLjQK", "filename": LINK}})),
    (CHAT, user({"type": "file", "file": {"file_id": "file-1"}})),
    (CHAT, user({"type": "image_url", "image_url": None, "uuid": "u"})),
    (CHAT, {"messages": [], "documents": [{"title": "x", "image": LINK, "source": LINK}]}),
    (RESPONSES, {"input": LINK, "instructions": LINK}),
    (RESPONSES, {"input": "x", "tools": [{"type": "function", "parameters": SCHEMA}]}),
    (RESPONSES, {"input": "x", "tools": [{"type": "mcp", "server_label": "a"}]}),
    (
        RESPONSES,
        {
            "input": [
                {"type": "function_call", "arguments": f'{{"url":"{LINK}"}}'},
                {"type": "function_call_output", "output": LINK},
                {"type": "web_search_call", "action": {"type": "open_page", "url": LINK}},
                {
                    "type": "message",
                    "content": [
                        {"type": "output_text", "text": LINK, "annotations": [{"url": LINK}]}
                    ],
                },
            ]
        },
    ),
    (MESSAGES, {"messages": [], "tools": [{"name": "get", "input_schema": SCHEMA}]}),
    (
        MESSAGES,
        user({"type": "tool_use", "name": "get", "input": {"image_url": LINK, "url": LINK}}),
    ),
    (
        MESSAGES,
        user(
            {
                "type": "web_search_tool_result",
                "content": [{"type": "web_search_result", "url": LINK, "title": "x"}],
            },
            {
                "type": "search_result",
                "source": LINK,
                "content": [{"type": "text", "text": LINK, "citations": [{"url": LINK}]}],
            },
            {
                "type": "web_fetch_tool_result",
                "content": {
                    "url": LINK,
                    "content": {"source": {"type": "text", "data": LINK}, "title": LINK},
                },
            },
        ),
    ),
    (EMBEDDINGS, {"input": LINK}),
    (EMBEDDINGS, {"input": [LINK, LINK]}),
    (EMBEDDINGS, {"input": [1, 2, 3]}),
    (RERANK, {"query": LINK, "documents": [LINK, {"text": LINK}]}),
]


@pytest.mark.parametrize(("path", "body"), HARMLESS)
def test_what_only_looks_like_a_link_to_content_passes(path, body):
    assert found(path, body) is None


@pytest.mark.parametrize("name", ["messages", "input", "image_url"])
def test_a_deep_body_is_no_burden(name):
    value: Any = {"image_url": LINK}
    for _ in range(50_000):
        value = [value]
    assert remote_url(ENDPOINTS[EMBEDDINGS], {name: value}) == "image_url"
    for _ in range(50_000):  # it is taken apart by steps, as its end would else be recursive
        [value] = value
