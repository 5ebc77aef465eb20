"""What the requests of one conversation have in common. Pure.

A server keeps what it has computed for a prompt, and the next turn of a conversation begins with
it. So a conversation had better stay where it is; it is told by how it began.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from llmproxy.jsonbytes import Member

#: How much of a prompt without messages is looked at, in characters.
PROMPT_HEAD = 256
#: How far the user's first turn is looked for in a large body, in bytes.
MAX_BEFORE_USER = 1024 * 1024

_TURNS = re.compile(rb"\[[ \t\r\n]*+\{")
# Quotes inside a string are escaped, so this is found nowhere else.
_OF_USER = re.compile(rb'"role"[ \t\r\n]*+:[ \t\r\n]*+"user"')


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


def affinity_of_large(raw: bytes, found: Iterable[Member]) -> bytes:
    """The same for a body that was not read whole, told by its text.

    raw: the body. found: its members.
    """
    where = {member.key: member for member in found}
    for name in ("messages", "input"):
        turns = where.get(name)
        if turns is not None and _TURNS.match(raw, turns.value_start):
            system, instructions = where.get("system"), where.get("instructions")
            return b" ".join([_head(raw, system), _head(raw, instructions), _beginning(raw, turns)])
    prompt = where.get("prompt", where.get("input") if "instructions" in where else None)
    is_text = prompt is not None and raw.startswith(b'"', prompt.value_start)
    return _head(raw, prompt).strip(b'"') if is_text else b""


def _head(raw: bytes, member: Member | None) -> bytes:
    if member is None:
        return b""
    return raw[member.value_start : min(member.value_end, member.value_start + PROMPT_HEAD)]


def _beginning(raw: bytes, turns: Member) -> bytes:
    """How the first turn begins, and the first one of the user.

    The text of that stands beside its role, behind it or before it.
    """
    start, end = turns.value_start, turns.value_end
    role = _OF_USER.search(raw, start, min(end, start + MAX_BEFORE_USER))
    if role is None:
        return raw[start : min(end, start + PROMPT_HEAD)]
    first = raw[start : min(role.start(), start + PROMPT_HEAD)]
    before = raw[max(start, role.start() - PROMPT_HEAD) : role.start()].rstrip(b" \t\r\n")
    if before.endswith(b"{"):
        said = raw[role.end() : min(end, role.end() + PROMPT_HEAD)]
        return first + said.partition(b'"role"')[0].rstrip(b"{}[], \t\r\n")
    return first + before


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
