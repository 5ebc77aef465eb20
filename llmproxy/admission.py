"""From a request's body to what may be sent for it, to one of its model's servers or to another.

    body --read--> model's name --find--> Model --check--> Admitted

Nothing is sent, and nothing is written down yet: what is wrong here is an answer to the client.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING

from twisted.internet.interfaces import IReactorTime

from llmproxy import audio, headers, policy, rewrite
from llmproxy.agent import BytesBody
from llmproxy.backends import Backends, Route
from llmproxy.config import Config
from llmproxy.endpoints import Body, Endpoint
from llmproxy.errors import UnsupportedMediaType
from llmproxy.form import Form
from llmproxy.forward import Admitted, Order
from llmproxy.framing import Fields
from llmproxy.jsonbytes import InvalidJSON
from llmproxy.meter import StreamMeter, read_answer
from llmproxy.model import Account
from llmproxy.parts import is_short
from llmproxy.steps import Turns
from llmproxy.survey import Survey
from llmproxy.upload import ClientGone

if TYPE_CHECKING:
    from llmproxy.site import Request

#: What was read of a body that is no longer takes little more than a connection does.
LIGHT = 2048
# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_MULTIPART = Body.MULTIPART


class Admission:
    """The way of one request's body. `model`: what it asks for, as soon as that is known."""

    __slots__ = ("_backends", "_clock", "_config", "_endpoint", "_request", "_turns", "model")

    def __init__(
        self,
        endpoint: Endpoint,
        request: Request,
        config: Config,
        backends: Backends,
        clock: IReactorTime,
        turns: Turns,
    ) -> None:
        self._endpoint = endpoint
        self._request = request
        self._config = config
        self._backends = backends
        self._clock = clock
        self._turns = turns
        self.model: str | None = None

    def admit(self, account: Account) -> Awaitable[Admitted]:
        """Read it, as far as it has to be known. Raises ProxyError, ClientGone."""
        sent = self._request.fields
        if b"content-encoding" in sent:
            raise UnsupportedMediaType("A request's body can't have a Content-Encoding here.")
        if self._endpoint.body is _MULTIPART:
            return self._form(sent, account)
        return self._json(sent, account)

    async def _json(self, sent: Fields, account: Account) -> Admitted:
        if headers.media_type(sent) != b"application/json":
            raise UnsupportedMediaType("Content-Type must be application/json.")
        endpoint, config, upload = self._endpoint, self._config, self._request.upload
        raw = upload.at_once(config.max_json_body)
        if raw is None:
            raw = await upload.read(config.max_json_body, config.timeout_read)
        request = rewrite.plan(endpoint, raw) if is_short(raw) else await self._large(raw)
        self.model = request.model
        model = self._backends.find(request.model, account.models)
        policy.check(endpoint, request.body, request.remote_url, model.backend)
        same = request.opening() if model.backend.policy == "prefix" else b""
        if len(request.raw) > LIGHT:  # it may have to wait
            request = rewrite.lightened(request)
        continuous = model.backend.usage == "continuous"

        def order(route: Route) -> Order:
            backend, meter = route.backend, None
            name = backend.model or backend.name
            body = rewrite.body_for(request, endpoint, model=name, continuous=continuous)
            if request.stream:
                meter = StreamMeter(
                    endpoint.shape,
                    show_usage=request.show_usage,
                    continuous=continuous,
                    show_continuous=request.show_continuous,
                    several=request.several,
                )
            return Order(
                route=route,
                path=endpoint.path,
                headers=headers.for_backend(sent, b"application/json", backend.token),
                body=BytesBody(body),
                read=lambda answer: read_answer(endpoint.shape, answer),
                meter=meter,
            )

        def ask() -> policy.Ask:
            return policy.ask(endpoint, request.body, len(request.raw), model.backend)

        return Admitted(model, order, ask, same)

    async def _large(self, raw: bytes) -> rewrite.JSONRequest:
        survey = Survey(self._endpoint, raw)
        try:
            await self._turns.do(self._while_there(survey.steps()))
        except InvalidJSON as error:
            raise rewrite.refusal(error) from None
        return rewrite.plan(self._endpoint, raw, survey)

    def _while_there(self, steps: Iterator[None]) -> Iterator[None]:
        """Some steps, as long as the client waits for them. Raises ClientGone."""
        for step in steps:
            if self._request.lost:
                raise ClientGone
            yield step

    async def _form(self, sent: Fields, account: Account) -> Admitted:
        config = self._config
        boundary = audio.boundary_of(sent.get(b"content-type", b""))
        self._request.upload.refuse_over(config.client_max_size)
        form = Form(
            self._request.upload,
            boundary,
            self._clock,
            hold_limit=config.max_json_body,
            max_size=config.client_max_size,
            timeout_s=config.timeout_read,
        )
        self.model = await form.model()
        model = self._backends.find(self.model, account.models)

        def order(route: Route) -> Order | None:
            backend = route.backend
            patience_s = backend.timeout or config.timeout_read
            if not form.start(backend.model or backend.name, patience_s):
                return None
            return Order(
                route=route,
                path=self._endpoint.path,
                headers=headers.for_backend(sent, form.content_type, backend.token),
                body=form,
                read=audio.read_audio,
                convert=lambda answer: audio.convert(answer, form.response_format),
            )

        return Admitted(model, order, lambda: policy.NOTHING_ASKED)
