"""What the turns of one conversation have in common, and other requests do not."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from llmproxy.affinity import PROMPT_HEAD, affinity

SYSTEM = {"role": "system", "content": "You are kind."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


FIRST = [SYSTEM, user("Hello")]
LATER = [*FIRST, answer("Hi"), user("How are you?")]


@pytest.mark.parametrize("name", ["messages", "input"])
def test_the_turns_of_a_conversation_belong_together(name: str) -> None:
    first = affinity({name: FIRST})
    assert first
    assert affinity({name: LATER, "temperature": 1}) == first
    assert affinity({name: [SYSTEM, user("Other")]}) != first


def test_the_system_prompt_is_part_of_a_conversation() -> None:
    assert affinity({"messages": [user("a")], "system": "x"}) != affinity({"messages": [user("a")]})
    assert affinity({"input": [user("a")], "instructions": "x"}) != affinity({"input": [user("a")]})


def test_a_prompt_is_told_by_its_beginning() -> None:
    beginning = "x" * PROMPT_HEAD
    assert affinity({"prompt": beginning + "a"}) == affinity({"prompt": beginning + "b"}) != b""
    assert affinity({"prompt": "a" + beginning}) != affinity({"prompt": beginning})


@pytest.mark.parametrize(
    "body",
    [{}, {"input": ["a", "b"]}, {"input": "embed me"}, {"messages": []}, {"messages": "x"},
     {"messages": ["x"]}, {"prompt": [1, 2]}, {"prompt": ""}],
)  # fmt: skip
def test_what_is_no_conversation_has_nothing_in_common(body: dict[str, Any]) -> None:
    assert affinity(body) == b""


def test_odd_turns_are_turns() -> None:
    assert affinity({"messages": [{}, 7, user("a")]})
    assert affinity({"messages": [{"role": 7}]})


def test_a_turn_may_be_nested_deeper_than_can_be_written() -> None:
    deep = orjson.loads(b"[" * 1000 + b"]" * 1000)
    assert affinity({"messages": [{"role": "user", "content": deep}]}) == b""
