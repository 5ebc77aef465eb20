"""What the turns of one conversation have in common, and other requests do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from llmproxy.affinity import MAX_BEFORE_USER, PROMPT_HEAD, affinity, affinity_of_large
from llmproxy.jsonbytes import members


def of_large(body: dict[str, Any]) -> bytes:
    raw = orjson.dumps(body)
    return affinity_of_large(raw, members(raw))


#: For short bodies and for large ones.
READ = pytest.mark.parametrize("affinity", [affinity, of_large])
SYSTEM = {"role": "system", "content": "You are kind."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


Affinity = Callable[[dict[str, Any]], bytes]
FIRST = [SYSTEM, user("Hello")]
LATER = [*FIRST, answer("Hi"), user("How are you?")]


@READ
@pytest.mark.parametrize("name", ["messages", "input"])
def test_the_turns_of_a_conversation_belong_together(affinity: Affinity, name: str) -> None:
    first = affinity({name: FIRST})
    assert first
    assert affinity({name: LATER, "temperature": 1}) == first
    assert affinity({name: [SYSTEM, user("Other")]}) != first


@READ
def test_the_system_prompt_is_part_of_a_conversation(affinity: Affinity) -> None:
    assert affinity({"messages": [user("a")], "system": "x"}) != affinity({"messages": [user("a")]})
    assert affinity({"input": [user("a")], "instructions": "x"}) != affinity({"input": [user("a")]})


@READ
def test_a_prompt_is_told_by_its_beginning(affinity: Affinity) -> None:
    beginning = "x" * PROMPT_HEAD
    assert affinity({"prompt": beginning + "a"}) == affinity({"prompt": beginning + "b"}) != b""
    assert affinity({"prompt": "a" + beginning}) != affinity({"prompt": beginning})


@READ
@pytest.mark.parametrize(
    "body",
    [{}, {"input": ["a", "b"]}, {"input": "embed me"}, {"messages": []}, {"messages": "x"},
     {"messages": ["x"]}, {"prompt": [1, 2]}, {"prompt": ""}],
)  # fmt: skip
def test_what_is_no_conversation_has_nothing_in_common(
    affinity: Affinity, body: dict[str, Any]
) -> None:
    assert affinity(body) == b""


def test_odd_turns_are_turns() -> None:
    assert affinity({"messages": [{}, 7, user("a")]})
    assert affinity({"messages": [{"role": 7}]})


def test_a_turn_may_be_nested_deeper_than_can_be_written() -> None:
    deep = orjson.loads(b"[" * 1000 + b"]" * 1000)
    assert affinity({"messages": [{"role": "user", "content": deep}]}) == b""


def test_a_large_conversation_is_told_by_how_its_user_begins() -> None:
    long = {"role": "system", "content": "x" * 300_000}
    first = of_large({"messages": [long, user("Hello"), answer("y" * 300_000)]})
    assert len(first) < 4 * PROMPT_HEAD
    assert of_large({"messages": [long, user("Hello"), answer("y" * 300_000), user("z")]}) == first
    assert of_large({"messages": [long, user("Bye"), answer("y" * 300_000)]}) != first
    reordered = {"content": "Hello", "role": "user"}
    assert of_large({"messages": [long, reordered]}) != of_large({"messages": [long, user("Bye")]})
    cut = {"role": "system", "content": "x" * (PROMPT_HEAD // 2)}
    early = {"messages": [cut, reordered]}
    assert of_large(early) == of_large({"messages": [cut, reordered, answer("Hi"), user("z")]})
    far = {"role": "system", "content": "x" * (MAX_BEFORE_USER + 1)}
    assert of_large({"messages": [far, user("a")]}) == of_large({"messages": [far, user("b")]})
