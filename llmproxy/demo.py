"""A small stand-in LLM server: every dialect that the proxy forwards, and nothing intelligent.

`--demo` starts it on loopback, so that the proxy can be tried without a GPU; the tests use it as
the backend whose own numbers a bill must equal.
"""

from __future__ import annotations

import hmac
import io
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
from multipart import (  # type: ignore[import-untyped]
    MultipartError,
    MultipartParser,
    parse_options_header,
)
from twisted.internet import task
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from llmproxy.demo_answers import HANDLERS, Answer, Call, Json, Refusal

#: Backends of a configuration that point to this server; `sample_backends` fills in the address.
SAMPLE_BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "demo-chat": {"device": "demo", "max_model_len": 8192},
    "demo-whisper": {"device": "demo"},
    "demo-embed": {"device": "demo", "max_model_len": 8192},
}


def sample_backends(url: str, token: str | None = None) -> dict[str, Json]:
    """`SAMPLE_BACKENDS` for a server at `url`, as the `[backends.*]` tables of a configuration."""
    there: Json = {"url": url} if token is None else {"url": url, "token": token}
    return {name: {**there, **table} for name, table in SAMPLE_BACKENDS.items()}


@dataclass(slots=True)
class Served:
    """One POST request as this server saw it, with its own count of what it did.

    `completion_tokens` grows while a stream runs and stays where it is when the client leaves.
    `prompt_tokens` is set once the request was understood, `seconds` is the audio's length.
    `finished`: the whole answer was written.
    """

    path: str
    headers: list[tuple[str, str]] = field(repr=False)
    body: bytes = field(repr=False)
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    status: int = 0
    finished: bool = False


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
}
_OPENAI_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
}


def _same(given: str | None, secret: str) -> bool:
    """Whether `given` is the secret, in a time that does not tell how much of it is right."""
    return given is not None and hmac.compare_digest(given.encode(), secret.encode())


def _is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def error_body(path: str, refusal: Refusal) -> bytes:
    """An error in the shape of the dialect that is spoken at `path`."""
    if _is_anthropic(path):
        kind = _ANTHROPIC_TYPES.get(refusal.status, "api_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": refusal.message}})
    kind = _OPENAI_TYPES.get(refusal.status, "InternalServerError")
    error = {"message": refusal.message, "type": kind}
    return orjson.dumps({"error": {**error, "param": refusal.param, "code": refusal.status}})


def _form(content_type: str, body: bytes) -> tuple[dict[str, str], bytes]:
    """(fields, the file's bytes) of a multipart form (RFC 7578)."""
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise Refusal(400, "A multipart/form-data body is required.")
    fields, audio = {}, b""
    # The body is in memory already: no part of it goes to a temporary file.
    size = len(body)
    limits = {"spool_limit": size, "memory_limit": size, "strict": True}
    try:
        for part in MultipartParser(io.BytesIO(body), options["boundary"], size, **limits):
            if part.filename is None:
                fields[part.name] = part.value
            elif part.name == "file":
                audio = part.raw
    except (MultipartError, UnicodeDecodeError) as error:
        raise Refusal(400, "The form could not be parsed.") from error
    return fields, audio


def _fields(content_type: str, body: bytes) -> Json:
    if not content_type.lower().startswith("application/json"):
        raise Refusal(400, "Only application/json is understood here.")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, "The body is not valid JSON.") from error
    if not isinstance(fields, dict):
        raise Refusal(400, "The body must be a JSON object.")
    return fields


class DemoServer:
    """The stand-in server.

    `token`: what `Authorization: Bearer` (on the Anthropic paths also `x-api-key`) must carry.
    `delay`: seconds before each token. `now`: what objects give as the time of their creation.
    `journal`: the last requests that it was sent, the newest last; `journal_size` bounds it.
    """

    log = Logger()

    def __init__(
        self,
        *,
        token: str | None = None,
        delay: float = 0.0,
        models: Sequence[str] = tuple(SAMPLE_BACKENDS),
        now: Callable[[], float] = time.time,
        journal_size: int = 10_000,
    ) -> None:
        self.token = token
        self.delay = delay
        self.models = tuple(models)
        self.now = now
        self.journal: deque[Served] = deque(maxlen=journal_size)
        self._prompt_tokens: Counter[str] = Counter()
        self._generated_tokens: Counter[str] = Counter()

    def resource(self, clock: IReactorTime | None = None) -> Resource:
        """All its paths; `clock` times the tokens (the global reactor unless given)."""
        if clock is None:
            from twisted.internet import reactor

            clock = cast(IReactorTime, reactor)
        return _Api(self, clock)

    def site(self, reactor: Any) -> Site:
        """What listens: `endpoint.listen(server.site(reactor))`."""
        # No form parsing: it would read a file's bytes into memory once more.
        site = Site(self.resource(reactor), reactor=reactor, parsePOSTFormSubmission=False)
        site.displayTracebacks = False
        site.log = _no_access_log  # type: ignore[method-assign]
        return site

    def metrics(self) -> bytes:
        """Its counters as vLLM names them, in Prometheus' text format."""
        lines = []
        for name, counted in (
            ("vllm:prompt_tokens_total", self._prompt_tokens),
            ("vllm:generation_tokens_total", self._generated_tokens),
        ):
            lines.append(f"# TYPE {name} counter\n")
            for model in self.models:
                labels = f'engine="0",model_name="{model}"'
                lines.append(f"{name}{{{labels}}} {float(counted[model])}\n")
        return "".join(lines).encode()

    def models_list(self) -> Json:
        """The answer to `GET /v1/models`."""
        return {"object": "list", "data": [self._model(name) for name in self.models]}

    def _model(self, name: str) -> Json:
        known = SAMPLE_BACKENDS.get(name, {}).get("max_model_len")
        made = {"id": name, "object": "model", "created": int(self.now()), "owned_by": "demo"}
        return {**made, "root": name, "parent": None, "max_model_len": known}

    def admit(self, path: str, request: Request) -> None:
        """Refuse a request that does not carry the token."""
        if self.token is None:
            return
        given = _same(request.getHeader("authorization"), f"Bearer {self.token}")
        if not given and _is_anthropic(path):
            given = _same(request.getHeader("x-api-key"), self.token)
        if not given:
            raise Refusal(401, "Unauthorized")

    def call(self, path: str, content_type: str, body: bytes) -> Call:
        """Parse a request. Raises `Refusal`."""
        audio = b""
        fields: Json
        if path.startswith("/v1/audio/"):
            fields, audio = _form(content_type, body)
        else:
            fields = _fields(content_type, body)
        model = fields.get("model")
        if not isinstance(model, str):
            raise Refusal(400, "`model` is required.", "model")
        if model not in self.models:
            raise Refusal(404, f"The model `{model}` does not exist.", "model")
        return Call(path, model, fields, int(self.now()), audio)

    def begun(self, served: Served, answer: Answer) -> None:
        """Count a request whose prompt was read."""
        served.prompt_tokens = answer.prompt_tokens
        served.seconds = answer.seconds
        self._prompt_tokens[served.model] += answer.prompt_tokens

    def generated(self, served: Served, tokens: int) -> None:
        """Count tokens of an answer."""
        served.completion_tokens += tokens
        self._generated_tokens[served.model] += tokens


def _no_access_log(request: HTTPRequest) -> None:
    """The proxy's log has its own line for each exchange."""


class _Api(Resource):
    """Every path of the server."""

    isLeaf = True

    def __init__(self, server: DemoServer, clock: IReactorTime) -> None:
        super().__init__()
        self._server = server
        self._clock = clock

    def render(self, request: Request) -> int:
        work = Deferred.fromCoroutine(self._serve(request))
        # A client that leaves ends the generation, as in vLLM.
        request.notifyFinish().addErrback(lambda _: work.cancel())
        work.addErrback(self._failed)
        return NOT_DONE_YET

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._server.log.failure("the demo server failed", failure)

    async def _serve(self, request: Request) -> None:
        path = request.path.decode("utf-8", "replace")
        try:
            if request.method == b"POST" and path in HANDLERS:
                await self._answer(path, request)
            else:
                self._look_up(path, request)
        except Refusal as refusal:
            request.setResponseCode(refusal.status)
            _finish(request, error_body(path, refusal))

    def _look_up(self, path: str, request: Request) -> None:
        if path == "/health":
            _finish(request, b"")
        elif path == "/metrics":
            _finish(request, self._server.metrics(), "text/plain; version=0.0.4; charset=utf-8")
        else:
            self._server.admit(path, request)
            _finish(request, orjson.dumps(self._listed(path, request)))

    def _listed(self, path: str, request: Request) -> Json:
        if path in HANDLERS or request.method not in (b"GET", b"HEAD"):
            raise Refusal(405, "Method Not Allowed")
        listed = self._server.models_list()
        if path == "/v1/models":
            return listed
        for model in listed["data"]:
            if path == f"/v1/models/{model['id']}":
                return cast(Json, model)
        raise Refusal(404, "Not Found")

    async def _answer(self, path: str, request: Request) -> None:
        content = request.content
        body: bytes = content.read() if content is not None else b""
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, values in request.requestHeaders.getAllRawHeaders()
            for value in values
        ]
        served = Served(path, headers, body)
        self._server.journal.append(served)
        try:
            self._server.admit(path, request)
            call = self._server.call(path, request.getHeader("content-type") or "", body)
            served.model = call.model
            answer = HANDLERS[path](call)
        except Refusal as refusal:
            served.status = refusal.status
            raise
        served.status = 200
        self._server.begun(served, answer)
        await self._write(request, served, answer)
        served.finished = True

    async def _write(self, request: Request, served: Served, answer: Answer) -> None:
        if answer.frames is None:
            if self._server.delay:
                await task.deferLater(
                    self._clock, self._server.delay * answer.completion_tokens, lambda: None
                )
            self._server.generated(served, answer.completion_tokens)
            _finish(request, answer.body, answer.content_type)
            return
        request.setHeader("Content-Type", "text/event-stream; charset=utf-8")
        request.setHeader("Cache-Control", "no-cache")
        for frame in answer.frames:
            if frame.tokens:
                await task.deferLater(self._clock, self._server.delay, lambda: None)
                self._server.generated(served, frame.tokens)
            request.write(frame.data)
        request.finish()


def _finish(request: Request, body: bytes, content_type: str = "application/json") -> None:
    request.setHeader("Content-Type", content_type)
    request.setHeader("Content-Length", str(len(body)))
    request.write(body)
    request.finish()
