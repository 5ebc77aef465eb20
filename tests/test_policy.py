"""What a request may ask of a backend: fields that none gets, and amounts."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy import media, policy
from llmproxy.config import Backend
from llmproxy.endpoints import ENDPOINTS
from llmproxy.errors import BadRequest

CHAT = ENDPOINTS["/v1/chat/completions"]
COMPLETIONS = ENDPOINTS["/v1/completions"]
EMBEDDINGS = ENDPOINTS["/v1/embeddings"]


def check(body: dict[str, Any], endpoint=CHAT, **limits: Any) -> None:
    backend = Backend(name="m", url="http://a", device="gpu", **limits)
    policy.check(endpoint, body, media.remote_url(endpoint, body), backend)


def refused(body: dict[str, Any], endpoint=CHAT, **limits: Any) -> str | None:
    """The name of the field that is refused."""
    with pytest.raises(BadRequest) as caught:
        check(body, endpoint, **limits)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message
    return caught.value.param


@pytest.mark.parametrize("name", sorted(policy.REFUSED))
@pytest.mark.parametrize("path", sorted(ENDPOINTS))
def test_a_field_that_no_backend_gets_is_refused_with_its_reason(path, name):
    values: list[Any] = ["x", 0, False, [], {}]
    for value in values:
        assert refused({"model": "m", name: value}, ENDPOINTS[path]) == name
    with pytest.raises(BadRequest, match=policy.REFUSED[name]):
        check({name: 1})
    check({"model": "m", name: None}, ENDPOINTS[path])


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("chat_template_kwargs", "chat_template"),
        ("chat_template_kwargs", "tokenize"),
        ("vllm_xargs", "kv_transfer_params"),
        ("vllm_xargs", "ec_transfer_params"),
    ],
)
def test_nor_by_way_of_another_field(name, inner):
    assert refused({name: {"a": 1, inner: "x"}}) == f"{name}.{inner}"
    check({name: {"enable_thinking": False}})
    check({name: None})


@pytest.mark.parametrize("value", ["bytes", "bytes_only"])
def test_an_answer_is_json(value):
    assert refused({"encoding_format": value, "input": "a"}, EMBEDDINGS) == "encoding_format"


def test_what_only_changes_the_answer_passes():
    check(
        {
            "logprobs": True,
            "top_logprobs": 20,
            "prompt_logprobs": 1,
            "echo": True,
            "ignore_eos": True,
            "min_tokens": 5,
            "use_beam_search": True,
            "return_token_ids": True,
            "priority": -1,
            "timings_per_token": True,
            "return_progress": True,
            "n_probs": 10,
            "cache_prompt": False,
            "truncate_prompt_tokens": 10,
            "user": "http://169.254.169.254/",
            "metadata": {"api_base": "x"},
            "encoding_format": "base64",
            "tools": [{"function": {"parameters": {"properties": {"api_base": {}}}}}],
        }
    )


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({}, 1),
        ({"n": None}, 1),
        ({"n": 1}, 1),
        ({"n": 3}, 3),
        ({"best_of": 4, "n": 2}, 4),
        ({"n_cmpl": 5}, 5),
        ({"prompt": "a"}, 1),
        ({"prompt": []}, 1),
        ({"prompt": ["a"]}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": {"prompt_string": "a"}}, 1),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": ["a"], "prompt_embeds": ["x", "y"]}, 3),
        ({"n": 10**18}, 10**18),
    ],
)
def test_answers_are_counted(body, count):
    assert policy.choices(body) == count


@pytest.mark.parametrize("name", ["n", "best_of", "n_cmpl"])
@pytest.mark.parametrize("value", [0, -1, True, False, "2", 2.0, 1e30, [2], {}])
def test_a_number_of_answers_is_a_whole_number(name, value):
    with pytest.raises(BadRequest) as caught:
        policy.choices({name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"n": 129}, "n"),
        ({"n": 1_000_000}, "n"),
        ({"best_of": 129}, "best_of"),
        ({"n_cmpl": 129, "n": 1}, "n"),
        ({"prompt": ["a"] * 43, "n": 3}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
    ],
)
def test_the_number_of_answers_is_limited(body, name):
    assert refused(body, COMPLETIONS) == name
    check(body, COMPLETIONS, max_choices=1_000_000)


def test_as_many_answers_as_allowed_pass():
    check({"n": 128})
    check({"prompt": ["a"] * 64, "n": 2}, COMPLETIONS)
    check({"n": 2}, max_choices=2)
    assert refused({"n": 2}, max_choices=1) == "n"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/embeddings", "input"),
        ("/v1/rerank", "documents"),
        *(("/v1/score", name) for name in ("text_1", "text_2", "data_1", "data_2", "documents")),
        *(("/v1/score", name) for name in ("queries", "items")),
    ],
)
def test_the_number_of_texts_is_limited(path, name):
    check({name: ["a"] * 2048}, ENDPOINTS[path])
    check({name: [1] * 5000}, ENDPOINTS[path])  # one text, in tokens
    assert refused({name: ["a"] * 2049}, ENDPOINTS[path]) == name
    assert refused({name: [[1]] * 2049}, ENDPOINTS[path]) == name
    assert refused({name: ["a"] * 3}, ENDPOINTS[path], max_batch=2) == name


def test_so_is_that_of_prompts():
    body = {"prompt": ["a"] * 3}
    assert refused(body, COMPLETIONS, max_batch=2) == "prompt"
    check(body, COMPLETIONS, max_batch=3)


def test_a_conversation_is_no_batch():
    check({"messages": [{"role": "user", "content": "x"}] * 3000}, CHAT)
    check({"input": [{"role": "user", "content": "x"}] * 3000}, ENDPOINTS["/v1/responses"])


LENGTHS = [
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "max_new_tokens",
    "n_predict",
    "min_tokens",
]


@pytest.mark.parametrize("name", LENGTHS)
def test_the_length_of_an_answer_is_limited_where_the_operator_says_so(name):
    for value in (0, 1, 100, None):
        check({name: value}, max_tokens=100)
    wrong_ones: list[Any] = [101, -1, 10**18, 1e30, True, "5", 5.0, [1], {}]
    for wrong in wrong_ones:
        assert refused({name: wrong}, max_tokens=100) == name
        check({name: wrong})


# Keys that mean something in some place, in any place.
KEYS = st.sampled_from(sorted({"url", "URL", "content", "source", "role"} | policy.NAMES))
SCALARS = st.none() | st.booleans() | st.integers() | st.sampled_from([0.5, "", "data:,", "a:b"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(KEYS, VALUES, max_size=6), st.sampled_from(sorted(ENDPOINTS)))
def test_whatever_a_body_holds_it_passes_or_is_refused(body, path):
    kept = {name: value for name, value in body.items() if name not in policy.REFUSED}
    for each in (body, kept):
        with suppress(BadRequest):
            check(each, ENDPOINTS[path], max_tokens=100)


# -- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "settings", "most"),
    [
        ("/v1/chat/completions", {}, {}, 101),
        ("/v1/chat/completions", {"max_tokens": 50}, {}, 151),
        ("/v1/chat/completions", {"max_tokens": 50, "max_completion_tokens": 70}, {}, 171),
        ("/v1/chat/completions", {"max_tokens": 50, "n": 3}, {}, 251),
        ("/v1/completions", {"max_tokens": 50, "prompt": ["a", "b"], "n": 2}, {}, 301),
        ("/v1/responses", {"max_output_tokens": 9}, {}, 110),
        ("/v1/chat/completions", {}, {"max_tokens": 1000}, 1101),
        ("/v1/chat/completions", {"max_tokens": 50}, {"max_tokens": 1000}, 151),
        ("/v1/chat/completions", {"max_tokens": 10**9}, {"max_model_len": 80}, 160),
        ("/v1/chat/completions", {"max_tokens": None}, {}, 101),
        ("/v1/chat/completions", {"max_tokens": -1}, {}, 101),
        ("/v1/chat/completions", {"max_tokens": "many"}, {}, 101),
        ("/v1/embeddings", {"max_tokens": 50}, {"max_tokens": 1000}, 101),
        ("/v1/messages/count_tokens", {"max_tokens": 50}, {}, 0),
    ],
)
def test_tokens_are_estimated_from_size_and_length(path, body, settings, most):
    backend = Backend(name="m", url="http://b:1", device="gpu", **settings)
    asked = policy.ask(ENDPOINTS[path], body, 400, backend)
    assert asked.prompt + asked.answer == most
    assert policy.ask(ENDPOINTS[path], policy.essence(body), 400, backend) == asked
