"""The admin site: `/metrics`, `/healthz` and `/readyz`, for operators and their probes.

It has a listener of its own, since nothing here asks for a key. Answers are small and made at
once; requests' bodies are dropped unread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web import http
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from llmproxy.metrics import CONTENT_TYPE

IDLE_TIMEOUT_S = 60.0

log = Logger()

#: Status, content type, body.
Answer = tuple[int, str, bytes]
#: Names of checks; a bool is a condition, a text is only shown.
Checks = Mapping[str, bool | str]


def json_answer(status: int, body: object) -> Answer:
    """An answer that carries `body`, as indented JSON for eyes and programs."""
    return status, "application/json", json.dumps(body, indent=1).encode() + b"\n"


def error_answer(status: int, code: str) -> Answer:
    """An error of the admin site."""
    return json_answer(status, {"error": {"code": code}})


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
    """One path, for GET and HEAD."""

    def __init__(self, answer: Callable[[], Answer]) -> None:
        super().__init__()
        self._answer = answer

    def getChild(self, path: bytes, request: http.Request) -> Resource:
        return _NotFound()

    def render(self, request: http.Request) -> bytes:
        if request.method not in (b"GET", b"HEAD"):
            request.responseHeaders.setRawHeaders("Allow", ["GET, HEAD"])
            return _send(request, error_answer(http.NOT_ALLOWED, "method_not_allowed"))
        try:
            answer = self._answer()
        except Exception:
            log.failure("{path} could not be answered", path=request.path)
            answer = error_answer(http.INTERNAL_SERVER_ERROR, "internal_error")
        return _send(request, answer)


class _NotFound(Resource):
    """Every other path."""

    isLeaf = True

    def render(self, request: http.Request) -> bytes:
        return _send(request, error_answer(http.NOT_FOUND, "not_found"))


def _send(request: http.Request, answer: Answer) -> bytes:
    """The body to return from `render`, once the head is set."""
    status, content_type, body = answer
    request.setResponseCode(status)
    for name, value in (
        ("Content-Type", content_type),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
    ):
        request.responseHeaders.setRawHeaders(name, [value])
    return b"" if request.method == b"HEAD" else body


def admin_resource(
    checks: Callable[[], Checks],
    backends: Callable[[], Mapping[str, str]],
    exposition: Callable[[], bytes] | None,
) -> Resource:
    """The tree of the admin site.

    `checks` and `backends` are asked at each `/readyz` (see `readiness_answer`; nothing secret
    may be in them), `exposition` at each `/metrics`. None: no metrics are shown.
    """
    root = _Page(lambda: error_answer(http.NOT_FOUND, "not_found"))
    root.putChild(b"healthz", _Page(health_answer))
    root.putChild(b"readyz", _Page(lambda: readiness_answer(checks(), backends())))
    if exposition is not None:
        root.putChild(b"metrics", _Page(lambda: (http.OK, CONTENT_TYPE, exposition())))
    return root


class _AdminRequest(Request):
    """A request whose body is not kept."""

    def handleContentChunk(self, data: bytes) -> None:
        """Drop it: no page of this site reads one."""


class AdminSite(Site):
    """The admin site on `clock`; probes come every few seconds, so there is no access log."""

    displayTracebacks = False

    def __init__(self, root: Resource, clock: IReactorTime) -> None:
        super().__init__(
            root,
            requestFactory=_AdminRequest,
            parsePOSTFormSubmission=False,
            timeout=IDLE_TIMEOUT_S,
            reactor=clock,
        )

    def log(self, request: http.Request) -> None:
        """Nothing."""
