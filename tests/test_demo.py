"""The stand-in LLM server, asked by the clients that people use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import openai
import pytest
import pytest_twisted
from clients import BACKEND_TOKEN, HELLO, HELLO_ANSWER, MESSAGE, NOW, Clients, listening, wav
from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from llmproxy.demo import SAMPLE_BACKENDS, DemoServer, Served, sample_backends
from llmproxy.demo_answers import Call, audio_seconds, generate

reactor: Any = _reactor


class Demo(Clients):
    """A running server, with its clients."""

    def __init__(self, server: DemoServer, clients: Clients) -> None:
        super().__init__(clients.url, clients.token)
        self.server = server

    @property
    def last(self) -> Served:
        return self.server.journal[-1]


@pytest_twisted.async_yield_fixture
async def demo() -> AsyncIterator[Demo]:
    server = DemoServer(token=BACKEND_TOKEN, now=lambda: NOW)
    async with listening(server) as clients:
        yield Demo(server, clients)


@pytest_twisted.ensureDeferred
async def test_chat_answers_with_its_own_count(demo):
    answer = await demo.ask(
        lambda client: client.chat.completions.create(model="demo-chat", messages=HELLO)
    )
    assert answer.choices[0].message.content == HELLO_ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 11)
    assert answer.created == 1_700_000_000
    assert (demo.last.prompt_tokens, demo.last.completion_tokens) == (3, 11)
    assert demo.last.finished
    assert demo.last.model == "demo-chat"
    assert demo.last.path == "/v1/chat/completions"


@pytest_twisted.ensureDeferred
async def test_the_same_question_gets_equal_objects(demo):
    def ask(client):
        return client.chat.completions.create(model="demo-chat", messages=HELLO, n=2)

    assert await demo.ask(ask) == await demo.ask(ask)


@pytest_twisted.ensureDeferred
async def test_chat_counts_every_choice_and_stops_at_max_tokens(demo):
    answer = await demo.ask(
        lambda client: client.chat.completions.create(
            model="demo-chat", messages=HELLO, n=3, max_tokens=4
        )
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == demo.last.completion_tokens == 12
    assert answer.usage.prompt_tokens == 3


def chat_stream(**options: Any) -> Callable[[openai.OpenAI], list[Any]]:
    return lambda client: list(
        client.chat.completions.create(model="demo-chat", messages=HELLO, stream=True, **options)
    )


@pytest_twisted.ensureDeferred
async def test_a_stream_has_no_usage_unless_asked_for(demo):
    chunks = await demo.ask(chat_stream())
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == HELLO_ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert demo.last.completion_tokens == 11


@pytest_twisted.ensureDeferred
async def test_continuous_usage_alone_asks_for_nothing(demo):
    chunks = await demo.ask(chat_stream(stream_options={"continuous_usage_stats": True}))
    assert all(chunk.usage is None for chunk in chunks)


@pytest_twisted.ensureDeferred
async def test_include_usage_adds_one_chunk_without_choices(demo):
    chunks = await demo.ask(chat_stream(n=2, stream_options={"include_usage": True}))
    assert [chunk.usage is not None for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == demo.last.completion_tokens == 22


@pytest_twisted.ensureDeferred
async def test_continuous_usage_runs_for_each_choice(demo):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await demo.ask(chat_stream(n=2, max_tokens=3, stream_options=options))
    running = [(chunk.choices[0].index, chunk.usage.completion_tokens) for chunk in chunks[:-1]]
    assert running == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]
    assert chunks[-1].usage.completion_tokens == 6


@pytest_twisted.ensureDeferred
async def test_stream_options_need_a_stream(demo):
    asked = {"model": "demo-chat", "messages": HELLO, "stream_options": {"include_usage": True}}
    reply = await demo.post("/v1/chat/completions", asked)
    assert (reply.status, reply.json()["error"]["param"]) == (400, "stream_options")
    assert (demo.last.status, demo.last.prompt_tokens, demo.last.finished) == (400, 0, False)


@pytest.mark.parametrize(
    ("prompt", "tokens", "choices"),
    [
        ("one two three", 3, 1),
        (["one two", "three"], 3, 2),
        ([11, 12, 13, 14], 4, 1),
        ([[11, 12], [13]], 3, 2),
    ],
)
@pytest_twisted.ensureDeferred
async def test_completions_take_every_kind_of_prompt(demo, prompt, tokens, choices):
    answer = await demo.ask(
        lambda client: client.completions.create(
            model="demo-chat", prompt=prompt, n=2, max_tokens=5
        )
    )
    assert [choice.index for choice in answer.choices] == list(range(2 * choices))
    assert answer.usage.prompt_tokens == demo.last.prompt_tokens == tokens
    assert answer.usage.completion_tokens == demo.last.completion_tokens == 10 * choices


@pytest_twisted.ensureDeferred
async def test_streamed_completions_say_the_same_as_whole_ones(demo):
    whole = await demo.ask(
        lambda client: client.completions.create(model="demo-chat", prompt="a b c")
    )
    chunks = await demo.ask(
        lambda client: list(
            client.completions.create(
                model="demo-chat",
                prompt="a b c",
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    )
    assert "".join(one.choices[0].text for one in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[0].id == whole.id


@pytest_twisted.ensureDeferred
async def test_embeddings_are_the_same_in_both_encodings(demo):
    def ask(**options):
        asked = {"model": "demo-embed", "input": ["a b", "c"], "dimensions": 4, **options}
        return demo.ask(lambda client: client.embeddings.create(**asked))

    numbers, text = await ask(encoding_format="float"), await ask(encoding_format="base64")
    decoded = await ask()  # the client asks for base64 and decodes it
    assert isinstance(text.data[0].embedding, str)
    assert [one.embedding for one in decoded.data] == [one.embedding for one in numbers.data]
    assert len(numbers.data[1].embedding) == 4
    assert numbers.data[0].embedding != numbers.data[1].embedding
    assert numbers.usage.prompt_tokens == numbers.usage.total_tokens == 3
    assert (demo.last.prompt_tokens, demo.last.completion_tokens) == (3, 0)


@pytest_twisted.ensureDeferred
async def test_responses_count_instructions_and_input(demo):
    answer = await demo.ask(
        lambda client: client.responses.create(
            model="demo-chat", instructions="Be brief", input="Hello over there"
        )
    )
    assert answer.output_text == HELLO_ANSWER
    assert answer.status == "completed"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 11)
    assert (demo.last.prompt_tokens, demo.last.completion_tokens) == (5, 11)


@pytest.mark.parametrize(("most", "status"), [(3, "incomplete"), (100, "completed")])
@pytest_twisted.ensureDeferred
async def test_a_response_stream_ends_with_the_whole_response(demo, most, status):
    asked: dict[str, Any] = {"model": "demo-chat", "max_output_tokens": most}
    asked["input"] = [{"role": "user", "content": [{"type": "input_text", "text": "a b"}]}]
    whole = await demo.ask(lambda client: client.responses.create(**asked))
    events = await demo.ask(lambda client: list(client.responses.create(**asked, stream=True)))
    assert events[0].type == "response.created"
    assert events[-1].type == f"response.{status}"
    assert events[-1].response == whole
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [one.delta for one in events if one.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) == whole.usage.output_tokens == demo.last.completion_tokens


@pytest_twisted.ensureDeferred
async def test_the_client_assembles_a_response_stream(demo):
    def ask(client):
        with client.responses.stream(model="demo-chat", input="Hello over there") as stream:
            return stream.get_final_response()

    assert (await demo.ask(ask)).output_text == HELLO_ANSWER


@pytest_twisted.ensureDeferred
async def test_messages_count_the_system_text(demo):
    answer = await demo.ask_anthropic(
        lambda client: client.messages.create(**MESSAGE, system="Be brief")
    )
    assert answer.content[0].text == HELLO_ANSWER
    assert answer.stop_reason == "end_turn"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 11)
    assert (demo.last.prompt_tokens, demo.last.completion_tokens) == (5, 11)


@pytest_twisted.ensureDeferred
async def test_a_message_stream_adds_up_to_the_whole_message(demo):
    def ask(client):
        with client.messages.stream(**MESSAGE | {"max_tokens": 4}) as stream:
            return [event.type for event in stream], stream.get_final_message()

    events, message = await demo.ask_anthropic(ask)
    whole = await demo.ask_anthropic(
        lambda client: client.messages.create(**MESSAGE | {"max_tokens": 4})
    )
    assert message.to_dict() == whole.to_dict()
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 4
    assert (events[0], events[-1]) == ("message_start", "message_stop")


@pytest_twisted.ensureDeferred
async def test_count_tokens_generates_nothing(demo):
    asked = {name: MESSAGE[name] for name in ("model", "messages")}
    answer = await demo.ask_anthropic(lambda client: client.messages.count_tokens(**asked))
    assert answer.input_tokens == 3
    assert (demo.last.prompt_tokens, demo.last.completion_tokens) == (0, 0)


def transcribe(**options: Any) -> Callable[[openai.OpenAI], Any]:
    file = ("sound.wav", wav(7.25))
    return lambda client: client.audio.transcriptions.create(
        model="demo-whisper", file=file, **options
    )


@pytest_twisted.ensureDeferred
async def test_a_transcription_knows_how_long_the_sound_is(demo):
    answer = await demo.ask(transcribe(response_format="verbose_json"))
    assert answer.duration == demo.last.seconds == 7.25
    assert [(one.start, one.end) for one in answer.segments] == [(0, 5), (5, 7.25)]
    assert "".join(one.text for one in answer.segments).strip() == answer.text
    short = await demo.ask(transcribe())
    assert short.text == answer.text
    assert short.usage.seconds == 8


@pytest_twisted.ensureDeferred
async def test_a_transcription_comes_as_plain_text_and_as_subtitles(demo):
    text = await demo.ask(transcribe(response_format="text"))
    srt = await demo.ask(transcribe(response_format="srt"))
    vtt = await demo.ask(transcribe(response_format="vtt"))
    words = text.split()
    assert srt.startswith("1\n00:00:00,000 --> 00:00:05,000\n" + " ".join(words[:10]))
    assert "\n\n2\n00:00:05,000 --> 00:00:07,250\n" in srt
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:05.000\n" + " ".join(words[:10]))


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # says the client itself
@pytest_twisted.ensureDeferred
async def test_translations_work_like_transcriptions(demo):
    file = ("sound.mp3", b"\0" * 32_000)
    answer = await demo.ask(
        lambda client: client.audio.translations.create(
            model="demo-whisper", file=file, response_format="verbose_json"
        )
    )
    assert answer.duration == demo.last.seconds == 2.0
    assert answer.language == "english"


@pytest_twisted.ensureDeferred
async def test_rerank_sorts_by_relevance_and_counts_each_pair(demo):
    asked = {"model": "demo-embed", "query": "red cats", "documents": ["a dog", "red cats here"]}
    answer = (await demo.post("/v1/rerank", asked)).json()
    assert [one["index"] for one in answer["results"]] == [1, 0]
    assert answer["usage"]["total_tokens"] == demo.last.prompt_tokens == 9
    first = (await demo.post("/v1/rerank", asked | {"top_n": 1})).json()
    assert first["results"] == answer["results"][:1]


@pytest_twisted.ensureDeferred
async def test_score_compares_one_text_with_each_of_the_others(demo):
    asked = {"model": "demo-embed", "text_1": "red cats", "text_2": ["a dog", "red cats"]}
    answer = (await demo.post("/v1/score", asked)).json()
    assert [one["index"] for one in answer["data"]] == [0, 1]
    assert answer["data"][1]["score"] > answer["data"][0]["score"]
    assert answer["usage"]["prompt_tokens"] == demo.last.prompt_tokens == 8


@pytest_twisted.ensureDeferred
async def test_models_are_listed_and_found(demo):
    listed = await demo.ask(lambda client: list(client.models.list()))
    assert [one.id for one in listed] == list(SAMPLE_BACKENDS)
    found = await demo.ask(lambda client: client.models.retrieve("demo-chat"))
    assert found == listed[0]
    with pytest.raises(openai.NotFoundError):
        await demo.ask(lambda client: client.models.retrieve("other"))


@pytest_twisted.ensureDeferred
async def test_openai_errors_are_what_the_client_knows(demo):
    def ask(**changed):
        asked = {"model": "demo-chat", "messages": HELLO, **changed}
        return lambda client: client.chat.completions.create(**asked)

    with pytest.raises(openai.AuthenticationError):
        await demo.ask(ask(), token="wrong")
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        await demo.ask(ask(model="other"))
    with pytest.raises(openai.BadRequestError):
        await demo.ask(ask(messages=[]))
    with pytest.raises(openai.BadRequestError):
        await demo.ask(ask(max_tokens=0))
    assert [one.status for one in demo.server.journal] == [401, 404, 400, 400]


@pytest_twisted.ensureDeferred
async def test_anthropic_errors_are_what_the_client_knows(demo):
    with pytest.raises(anthropic.AuthenticationError):
        await demo.ask_anthropic(lambda client: client.messages.create(**MESSAGE), api_key="wrong")
    with pytest.raises(anthropic.NotFoundError) as caught:
        await demo.ask_anthropic(
            lambda client: client.messages.create(**MESSAGE | {"model": "other"})
        )
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b'{"model":7}', 400),
        ("/v1/chat/completions", b'{"model":"demo-chat","messages":[{}],"stream":"true"}', 400),
        ("/v1/chat/completions", b'{"model":"demo-chat","messages":[{}],"n":1000000}', 400),
        ("/v1/completions", b'{"model":"demo-chat","prompt":[1,"a"]}', 400),
        ("/v1/messages", b'{"model":"demo-chat","messages":[{}]}', 400),
        ("/v1/audio/transcriptions", b'{"model":"demo-whisper"}', 400),
        ("/v1/load_lora_adapter", b"{}", 405),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_it_does_not_understand_is_refused(demo, path, body, status):
    assert (await demo.post(path, body)).status == status


@pytest_twisted.ensureDeferred
async def test_health_and_metrics_tell_what_was_generated(demo):
    await demo.ask(chat_stream(max_tokens=4))
    health = await demo.get("/health")
    assert (health.status, health.body) == (200, b"")
    lines = (await demo.get("/metrics")).body.decode().splitlines()
    assert 'vllm:prompt_tokens_total{engine="0",model_name="demo-chat"} 3.0' in lines
    assert 'vllm:generation_tokens_total{engine="0",model_name="demo-chat"} 4.0' in lines
    assert 'vllm:generation_tokens_total{engine="0",model_name="demo-embed"} 0.0' in lines


@pytest_twisted.ensureDeferred
async def test_the_journal_has_the_request_as_it_came(demo):
    body = b'{"model": "demo-chat", "messages": [{"role": "user", "content": "a"}]}'
    await demo.post("/v1/chat/completions", body)
    assert demo.last.body == body
    assert ("Authorization", f"Bearer {BACKEND_TOKEN}") in demo.last.headers
    assert BACKEND_TOKEN not in repr(demo.last)
    assert "content" not in repr(demo.last)


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_ends_the_generation():
    def leave(client: openai.OpenAI) -> int:
        asked: dict[str, Any] = {"model": "demo-chat", "messages": HELLO, "stream": True}
        with client.chat.completions.create(**asked, extra_body={"min_tokens": 100_000}) as stream:
            return sum(1 for _ in zip(range(6), stream, strict=False)) - 1

    server = DemoServer(delay=0.005)
    async with listening(server) as clients:
        read = await clients.ask(leave, token="any")
        await deferLater(reactor, 0.05)
        [served] = server.journal
        generated = served.completion_tokens
        assert 0 < read <= generated < 100
        assert not served.finished
        await deferLater(reactor, 0.05)
        assert served.completion_tokens == generated


def test_audio_that_is_no_wav_is_guessed_by_size():
    assert audio_seconds(b"\xff" * 24_000) == 1.5
    assert audio_seconds(wav(0.5)) == 0.5


def test_min_tokens_repeats_the_answer():
    call = Call("/v1/completions", "m", {"min_tokens": 25, "max_tokens": 25}, 0)
    choice = generate("a", 0, call, 1)
    assert len(choice.words) == 25
    assert not choice.cut


def test_sample_backends_are_tables_of_a_configuration():
    tables = sample_backends("http://127.0.0.1:9", "secret")
    assert tables["demo-chat"] == {
        "url": "http://127.0.0.1:9",
        "token": "secret",
        "device": "demo",
        "max_model_len": 8192,
    }
    assert list(tables) == ["demo-chat", "demo-whisper", "demo-embed"]
