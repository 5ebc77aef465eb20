"""The Resource tree of the public site: exactly the listed paths, nothing else.

/ -> v1 -> chat -> completions          ExchangeResource
           messages -> count_tokens     ExchangeResource
           models -> {id}               ModelsResource
           ...
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast
from urllib.parse import unquote_to_bytes

import orjson
from twisted.logger import Logger
from twisted.web.resource import IResource, Resource
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Backend
from llmproxy.dialects import error_answer
from llmproxy.downstream import Downstream
from llmproxy.endpoints import ENDPOINTS, Dialect, Endpoint
from llmproxy.errors import MethodNotAllowed, ModelNotFound, NotFound, ProxyError
from llmproxy.exchange import Exchange, Services, key_sent
from llmproxy.site import Request
from llmproxy.story import begin

MODELS = b"/v1/models"
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


class ModelsResource(PathResource):
    """`GET /v1/models` and `GET /v1/models/{id}`: the backends, for a valid key."""

    methods = (b"GET", b"HEAD")
    isLeaf = True

    def __init__(self, services: Services, started: int) -> None:
        super().__init__()
        self._services = services
        self._started = started

    def answer(self, request: Request) -> None:
        """List the models, or describe one."""
        begin(self._answer(request))

    async def _answer(self, request: Request) -> None:
        down = Downstream(request, self._services.clock, self._services.config.timeout_read)
        try:
            key = key_sent(request, Dialect.ANTHROPIC)
            account = await self._services.authenticator.authenticate(key, request.peer)
            body = self._described(request.path, account.models)
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

    def _described(self, path: bytes, allowed: Collection[str] | None) -> bytes:
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


def make_root(services: Services, started: int) -> IResource:
    """The tree. `started`: Unix time, shown as the models' `created`."""
    root = PathResource()
    for endpoint in ENDPOINTS.values():
        _put(root, endpoint.path, ExchangeResource(endpoint, services))
    _put(root, MODELS.decode(), ModelsResource(services, started))
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
