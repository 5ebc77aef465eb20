"""The admin site: `/metrics`, `/healthz`, `/readyz`, for operators and their probes, and
`/openapi.json`, for who wants to know what there is.

It has a listener of its own, since nothing here asks for a key. Answers are small and made at
once; requests' bodies are dropped unread. What is no request, or too large for one, is refused as
on the public site.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from typing import cast

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web import http
from twisted.web.resource import IResource, Resource
from twisted.web.server import NOT_DONE_YET

from llmproxy import dialects
from llmproxy.endpoints import Dialect
from llmproxy.errors import MethodNotAllowed, NotFound, ProxyError
from llmproxy.metrics import CONTENT_TYPE
from llmproxy.site import Request, Site

METHODS = (b"GET", b"HEAD")
#: What every answer has: none is for caches, nor for a browser to guess its type.
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

log = Logger()

#: Status, content type, body.
Answer = tuple[int, str, bytes]
#: Names of checks; a bool is a condition, a text is only shown.
Checks = Mapping[str, bool | str]


def json_answer(status: int, body: object) -> Answer:
    """An answer that carries `body`, as indented JSON for eyes and programs."""
    return status, "application/json", json.dumps(body, indent=1).encode() + b"\n"


def error_answer(error: ProxyError) -> Answer:
    """An error in OpenAI's shape, as those have it that come from below HTTP's methods."""
    return error.status, "application/json", dialects.error_body(Dialect.OPENAI, error)


def description() -> Answer:
    """What both sites answer, in OpenAPI 3.1: docs/openapi.yaml as JSON."""
    text = resources.files("llmproxy").joinpath("openapi.json").read_bytes()
    return http.OK, "application/json", text


def health_answer() -> Answer:
    """Who can answer at all is alive; what a restart can't mend is no reason for one."""
    return http.OK, "text/plain; charset=utf-8", b"ok\n"


def readiness_answer(checks: Checks, backends: Mapping[str, str]) -> Answer:
    """200 when every condition in `checks` holds and a backend is up, or none is configured.

    `backends` has the state of each (`up`, `down`, `unknown`). Else 503; the body is the same:
    `{"ready": ..., "checks": {...}, "backends": {...}}`.
    """
    usable = not backends or "up" in backends.values()
    shown = {**checks, "backends": usable}
    ready = all(value for value in shown.values() if isinstance(value, bool))
    body = {"ready": ready, "checks": shown, "backends": dict(backends)}
    return json_answer(http.OK if ready else http.SERVICE_UNAVAILABLE, body)


class _Page(Resource):
    """One path, for GET and HEAD; None: there is nothing at it."""

    def __init__(self, answer: Callable[[], Answer] | None = None) -> None:
        super().__init__()
        self._answer = answer

    def getChild(self, path: bytes, request: Request) -> Resource:
        """Every other path."""
        return _Page()

    def render(self, request: Request) -> int:
        """Answer at once."""
        headers: dict[str, str] = {}
        try:
            status, content_type, body = self._answered(request)
        except ProxyError as error:
            headers = error.headers
            status, content_type, body = error_answer(error)
        headers |= {"Content-Type": content_type} | HEADERS
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        request.answer(status, fields, body)
        return NOT_DONE_YET

    def _answered(self, request: Request) -> Answer:
        if self._answer is None:
            raise NotFound("There is nothing at this path.")
        if request.method not in METHODS:
            allowed = {"Allow": b", ".join(METHODS).decode()}
            raise MethodNotAllowed("This path takes another method.", headers=allowed)
        try:
            return self._answer()
        except Exception:
            log.failure("{path} could not be answered", path=request.path)
            raise ProxyError("Something went wrong on our side.") from None


def admin_resource(
    checks: Callable[[], Checks],
    backends: Callable[[], Mapping[str, str]],
    exposition: Callable[[], bytes] | None,
) -> IResource:
    """The tree of the admin site.

    `checks` and `backends` are asked at each `/readyz` (see `readiness_answer`; nothing secret
    may be in them), `exposition` at each `/metrics`. None: no metrics are shown.
    """
    described = description()
    root, pages = _Page(), _Page()
    root.putChild(b"", pages)  # a path begins with a slash
    pages.putChild(b"healthz", _Page(health_answer))
    pages.putChild(b"readyz", _Page(lambda: readiness_answer(checks(), backends())))
    pages.putChild(b"openapi.json", _Page(lambda: described))
    if exposition is not None:
        pages.putChild(b"metrics", _Page(lambda: (http.OK, CONTENT_TYPE, exposition())))
    return cast(IResource, root)


class AdminSite(Site):
    """The admin site on `clock`. Probes come every few seconds: nothing is counted or logged."""

    def __init__(self, root: IResource, clock: IReactorTime) -> None:
        super().__init__(
            root, clock, metrics=None, monotonic=clock.seconds, origin=None, http="llhttp"
        )
