"""Header fields, both ways: only those that are listed cross, whatever else is sent.

What a client sends is looked for in the bytes that the backend got, and the other way round.
"""

from __future__ import annotations

import gzip
import math
import zlib
from itertools import chain, product
from pathlib import Path
from typing import Any

import orjson
import pytest_twisted
from backend import (
    CHUNKED,
    DONE,
    JSON,
    LAST_CHUNK,
    SSE,
    Flood,
    ScriptedBackend,
    Seen,
    chunk,
    head,
    json_answer,
    raw_answer,
    sse_answer,
    sse_event,
)
from proxy import Answer, ProxyHandle, request_bytes, running_proxy
from twisted.internet.defer import Deferred, gatherResults

from llmproxy.headers import TO_BACKEND

CHAT, AUDIO = "/v1/chat/completions", "/v1/audio/transcriptions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
COMPLETION = {"choices": [], "usage": USAGE}
STREAM: list[Any] = [{"choices": [{"index": 0, "delta": {"content": "x"}}]}, COMPLETION, DONE]
FORM = (
    b'--X\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\naudio\r\n--X--\r\n'
)
#: How many fields are sent at once: a header may have a hundred.
AT_ONCE = 60
CANARY, TOKEN = "canary-of-the-client", "token-of-the-backend"


def names(text: str) -> list[str]:
    return text.split()


#: What clients, browsers, front proxies, CDNs and clouds send, and what would be trusted if it
#: came from us.
CLIENT_FIELDS = names("""
A-IM Accept-Charset Accept-Datetime Accept-Language Access-Control-Request-Headers
Access-Control-Request-Method Akamai-Origin-Hop Alt-Used Anthropic-Client-Sha
Anthropic-Dangerous-Direct-Browser-Access Api-Key Apikey Auth Baggage B3 CDN-Loop
CF-Access-Client-Id CF-Access-Client-Secret CF-Connecting-IP CF-IPCountry CF-Ray CF-Visitor
Cache-Control Client-IP Cookie Cookie2 DNT DPoP Date Device-Memory Downlink Early-Data
Fastly-Client-IP Forwarded From Front-End-Https Gateway-Interface Host-Override HTTP2-Settings
Idempotency-Key If-Match If-Modified-Since If-None-Match If-Range If-Unmodified-Since
Incap-Client-IP Keep-Alive Kubernetes-Impersonate Impersonate-User Last-Event-ID Link Max-Forwards
Metadata Metadata-Flavor MIME-Version OpenAI-Beta OpenAI-Organization OpenAI-Project
Ocp-Apim-Subscription-Key Origin Pragma Prefer Priority Proxy Proxy-Authenticate
Proxy-Authorization Proxy-Connection Proxy-Status Range Referer Remote-Addr Remote-User Request-Id
Save-Data Sec-CH-UA Sec-CH-UA-Mobile Sec-CH-UA-Platform Sec-Fetch-Dest Sec-Fetch-Mode
Sec-Fetch-Site Sec-GPC Sec-WebSocket-Key Sec-WebSocket-Protocol Server-Timing Service-Worker
Set-Cookie Signature Signature-Input SSL-Client-Cert SSL-Client-Verify Surrogate-Capability TE
Timestamp Trailer True-Client-IP Uber-Trace-Id Upgrade-Insecure-Requests Via Viewport-Width
WL-Proxy-Client-IP WWW-Authenticate Warning Width X-Accel-Redirect X-Amz-Cf-Id X-Amz-Date
X-Amz-Security-Token X-Amzn-Oidc-Data X-Amzn-Oidc-Identity X-Amzn-Trace-Id X-Api-Key X-Api-Version
X-App-Engine-Country X-ARR-SSL X-Auth-Request-User X-Auth-Token X-Authenticated-User
X-Authorization X-Azure-ClientIP X-B3-Sampled X-B3-SpanId X-B3-TraceId X-Client-Cert X-Client-Data
X-Client-IP X-Cloud-Trace-Context X-Cluster-Client-IP X-Code-Assist X-Consumer-Custom-ID
X-Consumer-Username X-Correlation-ID X-Credential-Identifier X-CSRF-Token
X-Custom-IP-Authorization X-DNS-Prefetch-Control X-DP-Rank X-Data-Parallel-Rank X-Email
X-Envoy-External-Address X-Envoy-Original-Path X-Forward-For X-Forwarded X-Forwarded-By
X-Forwarded-Client-Cert X-Forwarded-Email X-Forwarded-For X-Forwarded-Groups X-Forwarded-Host
X-Forwarded-Path X-Forwarded-Port X-Forwarded-Prefix X-Forwarded-Proto X-Forwarded-Scheme
X-Forwarded-Server X-Forwarded-Ssl X-Forwarded-Uri X-Forwarded-User X-Frame-Options
X-Gateway-Token X-GitHub-Token X-Goog-Api-Key X-Goog-Authenticated-User-Email
X-Goog-IAP-JWT-Assertion X-Groups X-HTTP-Host-Override X-HTTP-Method X-HTTP-Method-Override X-Host
X-Internal X-JWT-Assertion X-KV-Transfer X-Litellm-Api-Key X-Litellm-Tags X-Lora-Adapter
X-Method-Override X-Middleware-Subrequest X-Model X-MS-Client-Principal
X-MS-Token-AAD-Access-Token X-Original-Forwarded-For X-Original-Host X-Original-URL
X-Originating-IP X-Prefill-Host-Port X-Priority X-ProxyUser-Ip X-Real-Host X-Real-IP X-Real-Port
X-Remote-Addr X-Remote-IP X-Remote-User X-Request-ID X-Request-Start X-Requested-With
X-Rewrite-URL X-Role X-Scheme X-Session-ID X-SSL-Client-DN X-Slo-Class X-Stainless-Arch
X-Stainless-Async X-Stainless-Helper-Method X-Stainless-Lang X-Stainless-OS
X-Stainless-Package-Version X-Stainless-Read-Timeout X-Stainless-Retry-Count X-Stainless-Runtime
X-Stainless-Runtime-Version X-Stainless-Timeout X-Tenant-ID X-Timer X-Trace-Id X-Trusted-Proxy
X-UIDH X-User X-User-ID X-VerifyHost X-Vercel-ID X-WAP-Profile X-XSRF-TOKEN X-Worker-Instance-Id
X_Forwarded_For X_Real_IP HTTP_X_FORWARDED_FOR
""")
#: What our request to a backend may have, and nothing else.
SENT = {"host", "content-length", "content-type", "authorization", "transfer-encoding"}
#: What an answer of ours has, whatever the backend's had.
TOLD = {
    *("server", "date", "x-request-id", "access-control-allow-origin"),
    *("access-control-expose-headers", "content-type", "content-length"),
}
TOLD_STREAM = TOLD - {"content-length"} | {
    "transfer-encoding",
    "cache-control",
    "x-accel-buffering",
}


def proxy_for(folder: Path, backend: ScriptedBackend, **settings: Any) -> Any:
    return running_proxy(folder, {"m": {"url": backend.url, "token": TOKEN}}, **settings)


def answer_to(seen: Seen) -> list[Any]:
    if seen.target == AUDIO:
        return [json_answer(200, {"text": "hello", "duration": 1.5})]
    return [sse_answer(STREAM) if seen.json().get("stream") else json_answer(200, COMPLETION)]


def requests(fields: dict[str, str]) -> list[bytes]:
    """One of each kind with these fields on top of its own."""
    form = {**fields, "Content-Type": "multipart/form-data; boundary=X"}
    return [
        request_bytes("POST", CHAT, orjson.dumps(ASK), fields=fields),
        request_bytes("POST", CHAT, orjson.dumps({**ASK, "stream": True}), fields=fields),
        request_bytes("POST", AUDIO, FORM, fields=form),
    ]


# --- to the backend -----------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_no_field_of_the_client_reaches_the_backend_unless_it_is_listed(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend(answer_to) as backend, proxy_for(tmp_path, backend) as proxy:
        for start in range(0, len(CLIENT_FIELDS), AT_ONCE):
            some = CLIENT_FIELDS[start : start + AT_ONCE]
            for request in requests(dict.fromkeys(some, CANARY)):
                answer = await proxy.send(request)
                assert answer.status == 200, answer.raw
                assert CANARY.encode() not in answer.raw
        assert len(backend.requests) == 3 * math.ceil(len(CLIENT_FIELDS) / AT_ONCE)
        for seen in backend.requests:
            assert CANARY.encode() not in seen.raw
            assert b"token2" not in seen.raw
            assert {name for name, _ in seen.headers} <= SENT
            assert seen.header("authorization") == f"Bearer {TOKEN}"


@pytest_twisted.ensureDeferred
async def test_the_listed_fields_reach_the_backend_and_connection_can_not_take_one_away(
    tmp_path: Path,
) -> None:
    listed = {name.decode(): f"kept-{name.decode()}" for name in TO_BACKEND}
    ours = "authorization, content-type, content-length, host, x-request-id, te, x-canary"
    hop_by_hop = {
        "Connection": f"keep-alive, {ours}, {', '.join(listed)}",
        "X-Canary": CANARY,
        "Keep-Alive": CANARY,
        "TE": "trailers",
        "Trailer": "X-Canary",
    }
    async with ScriptedBackend(answer_to) as backend, proxy_for(tmp_path, backend) as proxy:
        for request in requests({**listed, **hop_by_hop}):
            answer = await proxy.send(request)
            assert answer.status == 200
            assert len(answer.fields["x-request-id"]) == 36
        for seen in backend.requests:
            for name, value in listed.items():
                assert seen.header(name) == value
            assert seen.header("authorization") == f"Bearer {TOKEN}"
            assert seen.header("content-type") is not None
            assert {name for name, _ in seen.headers} <= SENT | {name.lower() for name in listed}


@pytest_twisted.ensureDeferred
async def test_trailers_of_the_client_reach_nobody(tmp_path: Path) -> None:
    body = orjson.dumps(ASK)
    fields = {"Transfer-Encoding": "chunked", "Content-Type": "application/json", "Host": "proxy"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    request = (
        f"POST {CHAT} HTTP/1.1\r\nAuthorization: Bearer token2\r\n{lines}\r\n".encode()
        + chunk(body)
        + f"0\r\nX-Real-IP: {CANARY}\r\nX-Canary: {CANARY}\r\n\r\n".encode()
    )
    async with ScriptedBackend(answer_to) as backend, proxy_for(tmp_path, backend) as proxy:
        assert (await proxy.send(request)).status == 200
        assert CANARY.encode() not in backend.requests[0].raw
        assert {name for name, _ in backend.requests[0].headers} <= SENT


# --- the request's id ---------------------------------------------------------------------------


async def ask_again(proxy: ProxyHandle, request: bytes, times: int) -> list[str]:
    """The ids in the answers to so many requests, on one connection."""
    client, told = await proxy.open(), []
    for _ in range(times):
        client.received = b""
        client.send(request)
        await client.when(lambda received: Answer(received).whole)
        told.append(client.answer().fields["x-request-id"])
    await client.close()
    return told


@pytest_twisted.ensureDeferred
async def test_the_same_id_a_thousand_times_is_a_thousand_rows(tmp_path: Path) -> None:
    clients, times = 20, 50
    count = clients * times
    request = request_bytes("POST", CHAT, orjson.dumps(ASK), fields={"X-Request-ID": CANARY})
    async with ScriptedBackend(answer_to) as backend, proxy_for(tmp_path, backend) as proxy:
        asking = [Deferred.fromCoroutine(ask_again(proxy, request, times)) for _ in range(clients)]
        told = list(chain(*await gatherResults(asking, consumeErrors=True)))
        assert len(backend.requests) == len(set(told)) == count
        assert {rid for (rid,) in proxy.rows("rid")} == set(told)
        assert proxy.bill() == {"m/gpu/prompt": 3 * count, "m/gpu/completion": 2 * count}


@pytest_twisted.ensureDeferred
async def test_another_requests_id_changes_nothing_of_that_request(tmp_path: Path) -> None:
    async with ScriptedBackend(answer_to) as backend, proxy_for(tmp_path, backend) as proxy:
        first = (await proxy.post(CHAT, ASK)).fields["x-request-id"]
        before = proxy.rows("*")
        second = await proxy.post(CHAT, ASK, key="token3", X_Request_ID=first)
        assert second.fields["x-request-id"] != first
        assert proxy.rows("*")[:1] == before
        assert [key for (key,) in proxy.rows("api_key")] == ["id-token2", "id-token3"]


@pytest_twisted.ensureDeferred
async def test_an_odd_id_is_nobodys(tmp_path: Path) -> None:
    odd = ["' OR 1=1 --", "\x80\xff", "", "../../x", "{}", "x" * 8000]
    async with ScriptedBackend(answer_to) as backend, proxy_for(tmp_path, backend) as proxy:
        for rid in odd:
            answer = await proxy.post(CHAT, ASK, X_Request_ID=rid)
            assert (answer.status, len(answer.fields["x-request-id"])) == (200, 36)
        refused = await proxy.post(CHAT, ASK, X_Request_ID="x" * 1024 * 1024)
        assert (refused.status, len(refused.fields["x-request-id"])) == (431, 36)
        assert len(backend.requests) == len(proxy.rows()) == len(odd)


# --- to the client ------------------------------------------------------------------------------

BACKEND_FIELDS = names("""
Accept-CH Accept-Patch Accept-Ranges Access-Control-Allow-Credentials Access-Control-Allow-Headers
Access-Control-Allow-Methods Access-Control-Allow-Origin Access-Control-Expose-Headers
Access-Control-Max-Age Age Allow Alt-Svc Anthropic-Organization-Id Authentication-Info
Cache-Control Clear-Site-Data Content-Disposition Content-Location Content-MD5 Content-Range
Content-Security-Policy Cross-Origin-Opener-Policy Date ETag Expires Keep-Alive Last-Modified Link
Location NEL OpenAI-Organization OpenAI-Version P3P Permissions-Policy Pragma Proxy-Authenticate
Proxy-Connection Public-Key-Pins Refresh Report-To Reporting-Endpoints Server Server-Timing
Set-Cookie Set-Cookie2 SourceMap Strict-Transport-Security Surrogate-Control TE
Timing-Allow-Origin Tk Vary Via WWW-Authenticate Warning X-Accel-Buffering X-Accel-Charset
X-Accel-Expires X-Accel-Limit-Rate X-Accel-Redirect X-AspNet-Version X-Backend X-Cache X-Debug
X-Frame-Options X-Internal-Host X-Kong-Upstream-Latency X-Lighttpd-Send-File X-Powered-By
X-Process-Time X-RateLimit-Limit-Requests X-Ratelimit-Remaining-Tokens X-Request-Id X-Robots-Tag
X-Runtime X-Sendfile X-Server-Id X-Upstream X-Varnish X-Vllm-Instance X-XSS-Protection
""")
MASKED = dict.fromkeys(BACKEND_FIELDS, CANARY)


@pytest_twisted.ensureDeferred
async def test_no_field_of_the_backend_reaches_the_client_unless_it_is_listed(
    tmp_path: Path,
) -> None:
    connection = {"Connection": "keep-alive, x-request-id, content-type, content-length"}
    fields = {**MASKED, **connection, "Trailer": "X-Canary"}
    shown, masked = (200, 400, 404, 422, 429), (201, 302, 401, 403, 500, 503)
    scripts = [json_answer(status, COMPLETION, fields) for status in shown + masked]
    async with ScriptedBackend(*scripts) as backend, proxy_for(tmp_path, backend) as proxy:
        for status in shown + masked:
            answer = await proxy.post(CHAT, ASK)
            assert CANARY.encode() not in answer.raw
            assert answer.fields.keys() == TOLD
            assert answer.status == (status if status in shown else 502)


@pytest_twisted.ensureDeferred
async def test_a_streams_fields_are_ours(tmp_path: Path) -> None:
    body = b"".join(map(sse_event, STREAM))
    async with ScriptedBackend([raw_answer(200, body, {**SSE, **MASKED})]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            answer = await proxy.post(CHAT, {**ASK, "stream": True})
            assert CANARY.encode() not in answer.raw
            assert answer.fields.keys() == TOLD_STREAM
            assert answer.fields["x-accel-buffering"] == "no"
            assert answer.fields["cache-control"] == "no-cache"
            assert proxy.rows() == [("settled", "complete", 3, 2)]


@pytest_twisted.ensureDeferred
async def test_no_redirect_is_followed_or_shown(tmp_path: Path) -> None:
    statuses = [300, 301, 302, 303, 304, 305, 307, 308, 399]
    async with ScriptedBackend(answer_to) as other:
        there = {**JSON, "Location": f"{other.url}{CHAT}", "Refresh": f"0; url={other.url}"}
        bodies = [b"" if status == 304 else b"go there" for status in statuses]
        scripts = [raw_answer(*each, there) for each in zip(statuses, bodies, strict=True)]
        async with ScriptedBackend(*scripts) as backend, proxy_for(tmp_path, backend) as proxy:
            for _ in statuses:
                answer = await proxy.post(CHAT, ASK)
                assert answer.status == 502
                assert answer.json()["error"]["code"] == "bad_gateway"
                assert other.url.encode() not in answer.raw
            assert (len(backend.requests), other.connections) == (len(statuses), [])
            assert set(proxy.rows()) == {("settled", "refused", None, None)}


# --- codings ------------------------------------------------------------------------------------

MIB = 1024 * 1024
SMALL = gzip.compress(orjson.dumps(COMPLETION))


def rss() -> int:
    """The bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


DEFLATED = zlib.compress(orjson.dumps(COMPLETION))
CODED: list[tuple[dict[str, str], bytes]] = [
    ({"Content-Encoding": "gzip"}, SMALL),
    ({"Content-Encoding": "x-gzip"}, SMALL),
    ({"Content-Encoding": "GZip"}, SMALL),
    ({"Content-Encoding": "deflate"}, DEFLATED),
    ({"Content-Encoding": "identity, gzip"}, SMALL),
    ({"Content-Encoding": "br"}, SMALL),
    ({"Content-Encoding": "zstd"}, SMALL),
    ({"Content-Encoding": "none"}, orjson.dumps(COMPLETION)),
    ({"Transfer-Encoding": "gzip, chunked"}, chunk(SMALL) + LAST_CHUNK),
    ({"Transfer-Encoding": "gzip"}, SMALL),
]


@pytest_twisted.ensureDeferred
async def test_an_answer_in_a_coding_is_no_answer(tmp_path: Path) -> None:
    cases = [(kind, *coded) for kind, coded in product((JSON, SSE), CODED)]
    scripts = [
        head(200, {**kind, **fields}) + body
        if "Transfer-Encoding" in fields
        else raw_answer(200, body, {**kind, **fields})
        for kind, fields, body in cases
    ]
    async with ScriptedBackend(*scripts) as backend, proxy_for(tmp_path, backend) as proxy:
        for kind, fields, _ in cases:
            got = await proxy.post(CHAT, {**ASK, "stream": kind is SSE}, Accept_Encoding="gzip")
            assert got.status == 502, fields
            assert got.json()["error"]["code"] == "bad_gateway"
        assert set(proxy.rows()) == {("orphan", "backend_failed", None, None)}
        assert len(proxy.rows()) == len(cases)
        assert proxy.bill() == {}
        assert {seen.header("accept-encoding") for seen in backend.requests} == {None}


@pytest_twisted.ensureDeferred
async def test_a_bomb_is_not_taken_apart_and_hardly_taken(tmp_path: Path) -> None:
    zeros = gzip.compress(bytes(32 * MIB))  # a thousandth of that
    bomb: list[Any] = [
        head(200, {**CHUNKED, "Content-Encoding": "gzip"}),
        Flood(chunk(zeros), 1000),
    ]
    async with ScriptedBackend(bomb) as backend, proxy_for(tmp_path, backend) as proxy:
        before = rss()
        for _ in range(5):
            assert (await proxy.post(CHAT, {**ASK, "stream": True})).status == 502
        for seen in backend.requests:
            await seen.connection.when_closed()
            assert seen.connection.sent < 8 * MIB  # what the kernel's buffers take
        assert rss() - before < 16 * MIB
        assert proxy.rows() == [("orphan", "backend_failed", None, None)] * 5
