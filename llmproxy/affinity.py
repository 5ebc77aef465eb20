"""What the requests of one conversation have in common. Pure.

A server keeps what it has computed for a prompt, and the next turn of a conversation begins with
it. So a conversation had better stay where it is; it is told by how it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

#: How much of a prompt without messages is looked at, in characters.
PROMPT_HEAD = 256


def affinity(body: Mapping[str, Any]) -> bytes:
    """The beginning of a request's conversation: what it says before the model first answers.

    Empty where there is none, as in a request for embeddings.
    """
    for name in ("messages", "input"):
        turns = body.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return _text([body.get("system"), body.get("instructions"), _first(turns)])
    prompt = body.get("prompt", body.get("input") if "instructions" in body else None)
    return prompt[:PROMPT_HEAD].encode() if isinstance(prompt, str) else b""


def _text(said: list[Any]) -> bytes:
    try:
        return orjson.dumps(said)
    except TypeError:  # nested deeper than orjson writes, though not than it reads
        return b""


def _first(turns: list[Any]) -> list[Any]:
    """The turns up to the first one of the user."""
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and turn.get("role") == "user":
            return turns[:number]
    return turns[:1]
