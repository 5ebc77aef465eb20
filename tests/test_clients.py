"""People's own clients get the same from the proxy as from the server, and the bill is right.

Every case runs twice: against the stand-in server itself, and through the proxy. What the client
makes of both answers must be equal, and the bill must be the server's own count.
"""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import pydantic
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from clients import BACKEND_TOKEN, HELLO, MESSAGE, NOW, Clients, listening, wav
from proxy import KEY, ProxyHandle, running_proxy
from twisted.internet import reactor as _reactor
from twisted.internet.defer import gatherResults
from twisted.internet.threads import deferToThread

from llmproxy.demo import DemoServer, Served
from llmproxy.storage.sqlite import connect

reactor: Any = _reactor

MODELS = ("demo-chat", "demo-running", "demo-whisper", "demo-embed")
#: A backend per model; `demo-running` is asked for running counts.
USAGE = {"demo-running": "continuous"}


@dataclass(frozen=True)
class Setting:
    """A server, a proxy before it, and clients of both."""

    server: DemoServer
    proxy: ProxyHandle
    direct: Clients
    through: Clients


@pytest_twisted.async_yield_fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    server = DemoServer(token=BACKEND_TOKEN, models=MODELS, now=lambda: NOW)
    async with listening(server) as direct:
        table = {"url": direct.url, "token": BACKEND_TOKEN, "device": "demo"}
        tables = {name: {**table, "usage": USAGE.get(name, "final")} for name in MODELS}
        async with running_proxy(tmp_path, tables) as proxy:
            yield Setting(server, proxy, direct, Clients(proxy.url, KEY))


def billed(served: Served) -> dict[str, int]:
    """The bill that the server's own count of a request makes."""
    if served.status != 200 or served.path.endswith("count_tokens"):
        return {}
    if served.path.startswith("/v1/audio/"):
        counts = {"transcription": math.ceil(served.seconds)}
    elif served.path in ("/v1/embeddings", "/v1/rerank", "/v1/score"):
        counts = {"embedding": served.prompt_tokens}
    else:
        counts = {"prompt": served.prompt_tokens, "completion": served.completion_tokens}
    return {f"{served.model}/demo/{kind}": count for kind, count in counts.items()}


def plain(answer: Any) -> Any:
    """What a client returned, in values that compare."""
    if isinstance(answer, pydantic.BaseModel):
        return type(answer).__name__, answer.model_dump(warnings=False)
    if isinstance(answer, list | tuple):
        return [plain(one) for one in answer]
    return answer


SOUND = ("sound.wav", wav(7.25))
OpenAICall = Callable[[openai.OpenAI], Any]
AnthropicCall = Callable[[anthropic.Anthropic], Any]


def chat(**options: Any) -> OpenAICall:
    asked: dict[str, Any] = {"model": "demo-chat", "messages": HELLO, **options}
    return lambda client: client.chat.completions.create(**asked)


def chat_stream(**options: Any) -> OpenAICall:
    asked: dict[str, Any] = {"model": "demo-chat", "messages": HELLO, "stream": True, **options}
    return lambda client: list(client.chat.completions.create(**asked))


def completion(prompt: Any, **options: Any) -> OpenAICall:
    return lambda client: client.completions.create(model="demo-chat", prompt=prompt, **options)


def completion_stream(prompt: Any, **options: Any) -> OpenAICall:
    asked: dict[str, Any] = {"model": "demo-chat", "prompt": prompt, "stream": True, **options}
    return lambda client: list(client.completions.create(**asked))


def embed(**options: Any) -> OpenAICall:
    asked: dict[str, Any] = {"model": "demo-embed", "input": ["a b c", "d"], **options}
    return lambda client: client.embeddings.create(**asked)


def respond(**options: Any) -> OpenAICall:
    asked: dict[str, Any] = {"model": "demo-chat", "input": "Hello there", **options}
    return lambda client: client.responses.create(**asked)


def respond_stream(**options: Any) -> OpenAICall:
    asked: dict[str, Any] = {"model": "demo-chat", "input": "Hello there", **options}
    return lambda client: list(client.responses.create(**asked, stream=True))


def transcribe(form: str | None, **options: Any) -> OpenAICall:
    given: dict[str, Any] = {} if form is None else {"response_format": form}
    return lambda client: client.audio.transcriptions.create(
        model="demo-whisper", file=SOUND, **given, **options
    )


def translate(form: str) -> OpenAICall:
    given: Any = form
    return lambda client: client.audio.translations.create(
        model="demo-whisper", file=SOUND, response_format=given
    )


WITH_USAGE = {"include_usage": True}
RUNNING = {"include_usage": True, "continuous_usage_stats": True}

OPENAI: dict[str, OpenAICall] = {
    "chat": chat(),
    "chat n=2": chat(n=2),
    "chat cut": chat(max_tokens=3),
    "chat of a server with running counts": chat(model="demo-running"),
    "chat stream": chat_stream(),
    "chat stream with usage": chat_stream(stream_options=WITH_USAGE),
    "chat stream with usage refused": chat_stream(stream_options={"include_usage": False}),
    "chat stream with running usage": chat_stream(stream_options=RUNNING),
    "chat stream n=2": chat_stream(n=2),
    "chat stream n=2 with usage": chat_stream(n=2, stream_options=WITH_USAGE),
    "running chat stream": chat_stream(model="demo-running"),
    "running chat stream n=2": chat_stream(model="demo-running", n=2),
    "running chat stream with usage": chat_stream(model="demo-running", stream_options=WITH_USAGE),
    "running chat stream with running usage": chat_stream(
        model="demo-running", stream_options=RUNNING
    ),
    "completion": completion("a b c"),
    "completion n=2": completion("a b c", n=2, max_tokens=5),
    "completion of several prompts": completion(["a b", "c"], n=2),
    "completion of tokens": completion([[11, 12], [13]]),
    "completion stream": completion_stream("a b c"),
    "completion stream with usage": completion_stream("a b", stream_options=WITH_USAGE),
    "completion stream of several prompts": completion_stream(["a b", "c"], n=2),
    "embeddings as the client likes them": embed(),
    "embeddings as floats": embed(encoding_format="float"),
    "embeddings as base64": embed(encoding_format="base64"),
    "embeddings of tokens": embed(input=[[1, 2, 3], [4]]),
    "response": respond(),
    "response with instructions, cut": respond(instructions="Be brief", max_output_tokens=3),
    "response of a list": respond(input=HELLO),
    "response stream": respond_stream(),
    "response stream, cut": respond_stream(max_output_tokens=3),
    "transcription": transcribe(None),
    "transcription json": transcribe("json"),
    "transcription text": transcribe("text"),
    "transcription srt": transcribe("srt"),
    "transcription vtt": transcribe("vtt"),
    "transcription verbose_json": transcribe("verbose_json", language="en"),
    "translation json": translate("json"),
    "translation text": translate("text"),
    "translation srt": translate("srt"),
    "translation verbose_json": translate("verbose_json"),
}


def message(**options: Any) -> AnthropicCall:
    return lambda client: client.messages.create(**MESSAGE | options)


def message_stream(client: anthropic.Anthropic) -> Any:
    with client.messages.stream(**MESSAGE, system="Be brief") as stream:
        return [*stream, stream.get_final_message()]


def count_tokens(client: anthropic.Anthropic) -> Any:
    return client.messages.count_tokens(model="demo-chat", messages=HELLO, system="Be brief")


ANTHROPIC: dict[str, AnthropicCall] = {
    "message": message(),
    "message with system text": message(system=[{"type": "text", "text": "Be brief"}]),
    "message cut": message(max_tokens=3),
    "message stream": message_stream,
    "message stream as events": lambda client: list(message(stream=True)(client)),
    "count_tokens": count_tokens,
}

PAIRS = {"text_1": "red cats", "text_2": ["a dog", "red cats"]}
RERANK = {"query": "red cats", "documents": ["a dog", "red cats here"]}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "rerank": ("/v1/rerank", {"model": "demo-embed", **RERANK}),
    "score": ("/v1/score", {"model": "demo-embed", **PAIRS}),
    "embeddings": ("/v1/embeddings", {"model": "demo-embed", "input": "a b"}),
    "chat": ("/v1/chat/completions", {"model": "demo-chat", "messages": HELLO}),
    "chat stream": (
        "/v1/chat/completions",
        {"model": "demo-chat", "messages": HELLO, "n": 2, "stream": True},
    ),
    "running chat stream": (
        "/v1/chat/completions",
        {"model": "demo-running", "messages": HELLO, "n": 2, "stream": True},
    ),
    "running completion stream": (
        "/v1/completions",
        {"model": "demo-running", "prompt": ["a b", "c"], "stream": True},
    ),
    "message stream": ("/v1/messages", {**MESSAGE, "stream": True}),
    "response stream": (
        "/v1/responses",
        {"model": "demo-chat", "input": "a b", "stream": True},
    ),
    "what the server refuses": (
        "/v1/chat/completions",
        {"model": "demo-chat", "messages": HELLO, "max_tokens": 0},
    ),
    "what the server refuses, as Anthropic says it": (
        "/v1/messages",
        {"model": "demo-chat", "messages": HELLO},
    ),
}


def check_bill(setting: Setting, served: Sequence[Served]) -> None:
    """The bill, which must be there already, is that of these requests and of no others."""
    expected = Counter[str]()
    for one in served:
        expected.update(billed(one))
    assert setting.proxy.bill() == expected
    keys = setting.proxy.query("SELECT api_key FROM event_oneoff")
    assert keys == [(f"id-{KEY}",)] * sum(len(billed(one)) for one in served)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client of translations
@pytest.mark.parametrize("case", OPENAI)
@pytest_twisted.ensureDeferred
async def test_openai_clients_get_the_same_and_pay_what_the_server_counted(setting, case):
    expected = plain(await setting.direct.ask(OPENAI[case]))
    setting.server.journal.clear()
    answer = plain(await setting.through.ask(OPENAI[case]))
    check_bill(setting, setting.server.journal)
    assert len(setting.server.journal) == 1
    assert answer == expected


@pytest.mark.parametrize("case", ANTHROPIC)
@pytest_twisted.ensureDeferred
async def test_anthropic_clients_get_the_same_and_pay_what_the_server_counted(setting, case):
    expected = plain(await setting.direct.ask_anthropic(ANTHROPIC[case]))
    setting.server.journal.clear()
    answer = plain(await setting.through.ask_anthropic(ANTHROPIC[case]))
    check_bill(setting, setting.server.journal)
    assert len(setting.server.journal) == 1
    assert answer == expected


@pytest.mark.parametrize("case", PLAIN)
@pytest_twisted.ensureDeferred
async def test_plain_http_gets_the_same_bytes(setting, case):
    path, body = PLAIN[case]
    expected = await setting.direct.post(path, body)
    setting.server.journal.clear()
    reply = await setting.through.post(path, body)
    check_bill(setting, setting.server.journal)
    assert (reply.status, reply.body) == (expected.status, expected.body)
    assert _media_type(reply.header("Content-Type")) == _media_type(expected.header("Content-Type"))


def _media_type(value: str | None) -> str:
    return (value or "").partition(";")[0].strip().lower()


@pytest_twisted.ensureDeferred
async def test_the_bill_names_the_request_id_that_the_client_got(setting):
    answer = await setting.through.ask(chat())
    assert answer._request_id
    other = await setting.through.ask(chat(n=2))
    rows = setting.proxy.query("SELECT rid, product, quantity FROM event_oneoff")
    assert sorted(rows) == sorted(
        [
            (answer._request_id, "demo-chat/demo/prompt", 3),
            (answer._request_id, "demo-chat/demo/completion", 11),
            (other._request_id, "demo-chat/demo/prompt", 3),
            (other._request_id, "demo-chat/demo/completion", 22),
        ]
    )


@pytest_twisted.ensureDeferred
async def test_anthropic_clients_may_send_the_key_as_a_bearer_token(setting):
    answer = await setting.through.ask_anthropic(message(), auth_token=KEY)
    assert answer.usage.output_tokens == 11
    check_bill(setting, setting.server.journal)


@pytest_twisted.ensureDeferred
async def test_clients_at_the_same_time_each_get_their_own_answer_and_bill(setting):
    def asked(number: int) -> OpenAICall:
        make = (chat, chat_stream)[number % 2]
        model = MODELS[number % 4 // 2]
        words = " ".join(f"word{number}" for _ in range(number + 1))
        return make(model=model, messages=[{"role": "user", "content": words}])

    def text(answer: Any) -> str:
        if isinstance(answer, list):
            return "".join(one.choices[0].delta.content for one in answer)
        return answer.choices[0].message.content

    numbers = range(24)
    answers = await gatherResults([setting.through.ask(asked(number)) for number in numbers])
    for number, answer in zip(numbers, answers, strict=True):
        assert text(answer).endswith(f" word{number}> which is {number + 1} words.") or not number
    assert len(setting.server.journal) == 24
    check_bill(setting, setting.server.journal)
    assert setting.proxy.rows("state") == [("settled",)] * 24


@pytest.mark.parametrize("model", ["demo-chat", "demo-running"])
@pytest_twisted.ensureDeferred
async def test_a_client_that_stops_reading_pays_what_the_server_generated(setting, model):
    def leave(client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": model, "messages": HELLO, "stream": True}
        with client.chat.completions.create(**asked, extra_body={"min_tokens": 500}) as stream:
            next(iter(stream))

    await setting.through.ask(leave)
    [row] = await setting.proxy.settled()
    assert row[0] == "settled"
    [served] = setting.server.journal
    assert served.completion_tokens == 500
    check_bill(setting, [served])


@pytest_twisted.ensureDeferred
async def test_the_models_are_the_backends(setting):
    listed = await setting.through.ask(lambda client: list(client.models.list()))
    assert [one.id for one in listed] == list(MODELS)
    assert {one.object for one in listed} == {"model"}
    assert listed[0].to_dict()["device"] == "demo"
    found = await setting.through.ask(lambda client: client.models.retrieve("demo-embed"))
    assert found.to_dict() == listed[3].to_dict()
    with pytest.raises(openai.NotFoundError) as caught:
        await setting.through.ask(lambda client: client.models.retrieve("other"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await setting.through.ask(lambda client: client.models.list(), token="wrong")


@pytest_twisted.ensureDeferred
async def test_openai_clients_know_the_errors(setting):
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        await setting.through.ask(chat(), token="wrong")
    assert wrong_key.value.code == "invalid_api_key"
    assert wrong_key.value.request_id
    with pytest.raises(openai.NotFoundError) as no_model:
        await setting.through.ask(chat(model="other"))
    assert no_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as not_understood:
        await setting.through.ask(chat(extra_body={"stream": "yes"}))
    assert not_understood.value.param == "stream"
    assert not setting.server.journal
    assert setting.proxy.rows() == []


@pytest_twisted.ensureDeferred
async def test_openai_clients_get_the_backends_own_refusal(setting):
    with pytest.raises(openai.BadRequestError) as refused:
        await setting.through.ask(chat(max_tokens=0))
    with pytest.raises(openai.BadRequestError) as expected:
        await setting.direct.ask(chat(max_tokens=0))
    assert refused.value.body == expected.value.body
    assert setting.proxy.bill() == {}


@pytest_twisted.ensureDeferred
async def test_anthropic_clients_know_the_errors(setting):
    with pytest.raises(anthropic.AuthenticationError) as wrong_key:
        await setting.through.ask_anthropic(message(), api_key="wrong")
    assert _anthropic_type(wrong_key) == "authentication_error"
    with pytest.raises(anthropic.NotFoundError) as no_model:
        await setting.through.ask_anthropic(message(model="other"))
    assert _anthropic_type(no_model) == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as not_understood:
        await setting.through.ask_anthropic(message(extra_body={"stream": "yes"}))
    assert _anthropic_type(not_understood) == "invalid_request_error"
    assert not setting.server.journal


def give_credit(proxy: ProxyHandle, tokens: int, *keys: str) -> None:
    with closing(connect(proxy.database)) as connection:
        connection.executemany(
            "INSERT INTO key_limit (api_key, tokens_total) VALUES (?, ?)",
            [(f"id-{key}", tokens) for key in keys],
        )


@pytest_twisted.ensureDeferred
async def test_clients_know_that_their_credit_is_used_up_and_do_not_try_again(setting):
    give_credit(setting.proxy, 0, KEY)
    with pytest.raises(openai.APIStatusError) as refused:
        await setting.through.ask(lambda client: chat()(client.with_options(max_retries=2)))
    assert (refused.value.status_code, refused.value.code) == (402, "insufficient_quota")
    assert refused.value.type == "insufficient_quota"
    with pytest.raises(anthropic.APIStatusError) as refused_too:
        await setting.through.ask_anthropic(
            lambda client: message()(client.with_options(max_retries=2))
        )
    assert (refused_too.value.status_code, _anthropic_type(refused_too)) == (402, "billing_error")
    metrics = (await setting.proxy.get("/metrics", port=setting.proxy.admin_port)).body
    assert b'llmproxy_limited_requests_total{limit="tokens_total"} 2.0' in metrics


@pytest_twisted.ensureDeferred
async def test_clients_know_it_in_the_middle_of_a_stream(setting):
    long: dict[str, Any] = {"model": "demo-running", "stream": True, "max_tokens": 1000}
    long["extra_body"] = {"min_tokens": 1000}
    give_credit(setting.proxy, 300, KEY, "token3")
    with pytest.raises(openai.APIError) as cut:
        await setting.through.ask(lambda client: list(chat(**long)(client)))
    assert cut.value.code == "insufficient_quota"
    with pytest.raises(anthropic.APIStatusError) as cut_too:
        await setting.through.ask_anthropic(
            lambda client: list(message(**long)(client)), api_key="token3"
        )
    assert _anthropic_type(cut_too) == "billing_error"
    assert setting.proxy.rows("outcome") == [("out_of_budget",)] * 2


def _anthropic_type(caught: pytest.ExceptionInfo[anthropic.APIStatusError]) -> str:
    body: Any = caught.value.body
    assert body["type"] == "error"
    return body["error"]["type"]


@pytest_twisted.ensureDeferred
async def test_the_backend_gets_its_own_token_and_not_the_clients_key(setting):
    await setting.through.ask(chat())
    await setting.through.ask_anthropic(message())
    for served in setting.server.journal:
        assert ("Authorization", f"Bearer {BACKEND_TOKEN}") in served.headers
        assert KEY not in str(served.headers)


def form(*parts: tuple[str, bytes]) -> list[bytes]:
    """A multipart form, cut after each boundary."""
    pieces = [
        b'\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n--BOUNDARY'
        % (head.encode(), content)
        for head, content in parts
    ]
    return [b"--BOUNDARY", *pieces, b"--\r\n"]


@pytest.mark.parametrize("model_first", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_form_that_comes_in_pieces_is_one_request_to_the_backend(tmp_path, model_first):
    parts = [("model", b"demo-whisper"), ('file"; filename="a.wav', b"sound " * 1000)]
    pieces = form(*(parts if model_first else reversed(parts)))
    head = (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: multipart/form-data; boundary=BOUNDARY\r\nConnection: close\r\n"
        f"Content-Length: {sum(map(len, pieces))}\r\n\r\n"
    )
    answer = json_answer(200, {"text": "a", "duration": 1.5, "segments": []})
    async with ScriptedBackend(answer) as backend:
        tables = {"demo-whisper": {"url": backend.url, "device": "demo"}}
        async with running_proxy(tmp_path, tables) as proxy:

            def send() -> bytes:
                with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as sock:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for piece in [head.encode(), *pieces]:
                        sock.sendall(piece)
                        time.sleep(0.05)  # so that each piece arrives alone
                    return b"".join(iter(lambda: sock.recv(4096), b""))

            reply = await deferToThread(send)
            assert reply.startswith(b"HTTP/1.1 200 ")
            [request] = backend.requests
            assert b"sound " * 1000 in request.body
            assert proxy.bill() == {"demo-whisper/demo/transcription": 2}
