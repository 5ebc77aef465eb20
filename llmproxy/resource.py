"""The Resource tree of the public site: exactly the listed paths, nothing else.

/ -> v1 -> chat -> completions          ExchangeResource
           messages -> count_tokens     ExchangeResource
           models -> {id}               ModelsResource
           usage                        UsageResource
           ...
"""

from __future__ import annotations

from dataclasses import asdict
from typing import cast
from urllib.parse import unquote_to_bytes

import orjson
from twisted.logger import Logger
from twisted.web.resource import IResource, Resource
from twisted.web.server import NOT_DONE_YET

from llmproxy import usage_report
from llmproxy.auth import key_of
from llmproxy.config import Backend
from llmproxy.dialects import error_answer
from llmproxy.downstream import Downstream
from llmproxy.endpoints import ENDPOINTS, Dialect, Endpoint
from llmproxy.errors import (
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    ProxyError,
    StorageError,
    Unavailable,
)
from llmproxy.exchange import Exchange, Services
from llmproxy.model import Account, utcnow
from llmproxy.site import Request
from llmproxy.storage import IUsage
from llmproxy.story import begin

MODELS = b"/v1/models"
USAGE = b"/v1/usage"
ALLOWED_HEADERS = (
    b"Authorization, Content-Type, X-Api-Key, Anthropic-Version, Anthropic-Beta, X-Request-ID,"
    b" X-Stainless-Arch, X-Stainless-Lang, X-Stainless-OS, X-Stainless-Package-Version,"
    b" X-Stainless-Retry-Count, X-Stainless-Runtime, X-Stainless-Runtime-Version,"
    b" X-Stainless-Timeout, X-Stainless-Helper-Method, Anthropic-Dangerous-Direct-Browser-Access"
)

log = Logger()


class PathResource(Resource):
    """A node of the tree; on its own it is nothing that can be asked for."""

    dialect = Dialect.OPENAI
    methods: tuple[bytes, ...] = ()
    #: It stands at one path of the tree, and is the same for all requests.
    is_fixed = False

    def getChild(self, name: bytes, request: Request) -> Resource:
        """Anything that is not in the tree."""
        return PathResource()

    def render(self, request: Request) -> int:
        """Answer with the method's `answer`, a preflight, or an error in the dialect's shape."""
        if not self.methods:
            request.refuse(self.dialect, NotFound("There is nothing at this path."))
        elif request.method == b"OPTIONS":
            self._preflight(request)
        elif request.method not in self.methods:
            allowed = {"Allow": b", ".join((*self.methods, b"OPTIONS")).decode()}
            error = MethodNotAllowed("This path takes another method.", headers=allowed)
            request.refuse(self.dialect, error)
        else:
            self.answer(request)
        return NOT_DONE_YET

    def answer(self, request: Request) -> None:
        """Serve one of `methods`."""
        raise NotImplementedError

    def _preflight(self, request: Request) -> None:
        """The answer to a CORS preflight (Fetch standard, section 3.2.2)."""
        methods = b", ".join((*self.methods, b"OPTIONS"))
        fields = [
            (b"Allow", methods),
            (b"Access-Control-Allow-Methods", methods),
            (b"Access-Control-Allow-Headers", ALLOWED_HEADERS),
            (b"Access-Control-Max-Age", b"86400"),
        ]
        request.answer(204, fields, b"")


class ExchangeResource(PathResource):
    """The proxy: each request is an `Exchange`."""

    methods = (b"POST",)
    is_fixed = True

    def __init__(self, endpoint: Endpoint, services: Services) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._services = services
        self.dialect = endpoint.dialect

    def answer(self, request: Request) -> None:
        """Begin the exchange. It looks after itself, and never fails."""
        begin(Exchange(self._endpoint, request, self._services).run())


class KeyedResource(PathResource):
    """What a valid key can ask of ourselves, and gets as JSON."""

    methods = (b"GET", b"HEAD")

    def __init__(self, services: Services) -> None:
        super().__init__()
        self._services = services

    async def body(self, request: Request, account: Account) -> bytes:
        """The answer's. Raises ProxyError."""
        raise NotImplementedError

    def answer(self, request: Request) -> None:
        """Look the key up, and tell it `body`."""
        begin(self._answer(request))

    async def _answer(self, request: Request) -> None:
        down = Downstream(request, self._services.clock, self._services.config.timeout_read)
        try:
            key = key_of(request.fields, Dialect.ANTHROPIC)
            account = await self._services.authenticator.authenticate(key, request.peer)
            body = await self.body(request, account)
        except ProxyError as error:
            request.log_refusal(error)
            down.answer(*error_answer(self.dialect, error))
        except Exception:
            log.failure("request {rid} failed", rid=request.rid)
            down.answer(
                *error_answer(self.dialect, ProxyError("Something went wrong on our side."))
            )
        else:
            down.answer(200, [(b"Content-Type", b"application/json")], body)


class ModelsResource(KeyedResource):
    """`GET /v1/models` and `GET /v1/models/{id}`: the backends."""

    isLeaf = True

    def __init__(self, services: Services, started: int) -> None:
        super().__init__(services)
        self._started = started

    async def body(self, request: Request, account: Account) -> bytes:
        """The list of models, or one."""
        path, allowed = request.path, account.models
        backends = self._services.backends
        if path == MODELS:
            listed = [self._model(*each) for each in backends.listed(allowed)]
            return orjson.dumps({"object": "list", "data": listed})
        try:
            name = unquote_to_bytes(path[len(MODELS) + 1 :]).decode()
        except UnicodeDecodeError:
            raise ModelNotFound("The model does not exist.", param="model") from None
        return orjson.dumps(self._model(name, backends.find(name, allowed).backend))

    def _model(self, name: str, backend: Backend) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "llmproxy",
            "device": backend.device,
            "max_model_len": backend.max_model_len,
        }


class UsageResource(KeyedResource):
    """`GET /v1/usage`: what the key itself has used, and what is left of its budgets."""

    is_fixed = True

    def __init__(self, services: Services, usage: IUsage) -> None:
        super().__init__(services)
        self._usage = usage

    async def body(self, request: Request, account: Account) -> bytes:
        """Its use by day and model."""
        query = request.uri.partition(b"?")[2]
        since, until = usage_report.period(query, utcnow().date())
        try:
            used = await self._usage.of(account.key_id, since, until)
        except StorageError:
            raise Unavailable("Usage can't be read right now; try again shortly.") from None
        config, limits = self._services.config, self._services.limits
        budgets = self._services.budgets
        scope = usage_report.SCOPES[config.db.is_mongodb]
        own = config.limits if limits is None else limits.of(account)
        left = {} if budgets is None else await budgets.left(account)
        return usage_report.report(used, since, until, scope, asdict(own), left)


def make_root(services: Services, started: int, usage: IUsage | None = None) -> IResource:
    """The tree. `started`: Unix time, shown as the models' `created`. `usage`: None, and its path
    is none."""
    root = PathResource()
    for endpoint in ENDPOINTS.values():
        _put(root, endpoint.path, ExchangeResource(endpoint, services))
    _put(root, MODELS.decode(), ModelsResource(services, started))
    if usage is not None:
        _put(root, USAGE.decode(), UsageResource(services, usage))
    return cast(IResource, root)


def _put(root: Resource, path: str, resource: PathResource) -> None:
    """Put a resource at its path, keeping the children of a node that was there before."""
    *folders, name = path.split("/")  # the first is empty: a path begins with a slash
    node = root
    for folder in folders:
        if folder.encode() not in node.children:
            node.putChild(folder.encode(), PathResource())
        node = cast(Resource, node.children[folder.encode()])
    old = node.children.get(name.encode())
    if old is not None:
        resource.children = cast(Resource, old).children
    node.putChild(name.encode(), resource)
