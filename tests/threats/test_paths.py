"""Only the listed paths lead to a backend, however another one is written.

The paths are those of the routes of vLLM 0.33 (its routers under vllm/entrypoints, what older
versions had, and FastAPI's own), of SGLang 0.5.23 (http_server.py) and of llama.cpp's server
(tools/server/server.cpp, 2026-11): most change the server or run a model unmetered.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import Mock

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from memory import Server
from proxy import Answer, request_bytes, running_proxy
from tally import LONG, Tally
from twisted.internet.task import Clock

from llmproxy import resource
from llmproxy.backends import Backends
from llmproxy.config import Config
from llmproxy.endpoints import ENDPOINTS
from llmproxy.exchange import Services
from llmproxy.model import Account
from llmproxy.resource import MODELS, make_root
from llmproxy.site import Request


def words(text: str) -> list[str]:
    return text.split()


VLLM = words(
    """
/load_lora_adapter /unload_lora_adapter /v1/load_lora_adapter /v1/unload_lora_adapter /sleep
/wake_up /is_sleeping /pause /resume /is_paused /update_weights /update_weight_version
/init_weight_transfer_engine /shutdown_weight_transfer_engine /start_weight_update
/start_draft_weight_update /finish_weight_update /weight_info /weight_checker /get_world_size
/collective_rpc /reset_prefix_cache /reset_mm_cache /reset_encoder_cache /release_kv_cache_memory
/server_info /start_profile /stop_profile /invocations /ping /pooling /classify /score /rerank
/v2/rerank /v2/embed /v1/audio/speech /tokenize /detokenize /tokenizer_info /metrics /version
/load /health /ready /readyz /docs /docs/oauth2-redirect /redoc /openapi.json
/static/swagger-ui.css /scale_elastic_ep /is_scaling_elastic_ep /fault_tolerance/status
/fault_tolerance/apply /kv_event_sources /abort_requests /inference/v1/generate
/inference/v1/abort_requests /generative_scoring /v1/chat/completions/batch
/v1/chat/completions/render /v1/chat/completions/derender /v1/completions/render
/v1/completions/derender /v1/messages/render /v1/responses/render /v1/responses/resp_1
/v1/responses/resp_1/cancel /v1/realtime /v1/decisions /v1/systemone /cohere/v2/chat
/cohere/v2/chat/render /generate
"""
)
SGLANG = words(
    """
/generate /encode /classify /v1/classify /v1/tokenize /v1/detokenize /flush_cache
/update_weights_from_disk /update_weights_from_tensor /update_weights_from_distributed
/update_weights_from_ipc /begin_weight_update /end_weight_update /init_weights_update_group
/destroy_weights_update_group /init_weights_send_group_for_remote_instance
/send_weights_to_remote_instance /get_weights_by_name /weights_checker /release_memory_occupation
/resume_memory_occupation /pause_generation /continue_generation /abort_request /open_session
/close_session /configure_logging /set_trace_level /set_internal_state /slow_down /freeze_gc
/load_lora_adapter_from_tensors /pd_role_switch /dumper/configure /get_server_info /get_model_info
/model_info /health_generate /hicache/storage-backend /hicache/storage-backend/clear
/add_external_corpus /remove_external_corpus /list_external_corpora /parse_function_call
/separate_reasoning /vertex_generate /start_expert_distribution_record
/stop_expert_distribution_record /dump_expert_distribution_record
/remote_instance_transfer_engine_info /register_transfer_engine_info /v1/loads /api/show
/api/generate /api/chat /api/tags
"""
)
LLAMA_CPP = words(
    """
/props /slots /slots/0 /lora-adapters /completion /completions /chat/completions /infill
/embedding /embeddings /reranking /v1/reranking /apply-template /responses /audio/transcriptions
/v1/chat/completions/control /v1/chat/completions/input_tokens /v1/responses/input_tokens
/v1/messages/count_tokens/x /v1/stream/conversation /v1/streams /v1/health /models /models/load
/models/unload /models/sse /cors-proxy /tools
"""
)
DANGEROUS = sorted({*VLLM, *SGLANG, *LLAMA_CPP, "/", "/v1", "/v1/", "/admin", "/healthz"})
LISTED = sorted(ENDPOINTS)


# --- tricks ---------------------------------------------------------------------------------------


def percent(path: str, ups: str = "") -> str:
    """Each letter (or each of `ups`) as its hexadecimal code."""
    return "".join(f"%{ord(c):02x}" if (c in ups if ups else c != "/") else c for c in path)


# How somebody writes a path so that one program in a row takes it for another one.
TRICKS: dict[str, Callable[[str], str]] = {
    "plain": lambda p: p,
    "under /v1": lambda p: "/v1" + p,
    "up": lambda p: "/v1/.." + p,
    "up from a listed path": lambda p: "/v1/chat/completions/../../.." + p,
    "up from a model": lambda p: "/v1/models/../.." + p,
    "down and up": lambda p: p + "/x/..",
    "here": lambda p: "/." + p,
    "here at the end": lambda p: p + "/.",
    "encoded up": lambda p: "/v1/%2e%2e" + p,
    "half encoded up": lambda p: "/v1/chat/completions/.%2E/%2e./%2e%2e" + p,
    "encoded slashes": lambda p: "/v1/chat/completions/..%2f..%2f.." + p.replace("/", "%2f"),
    "encoded slash inside": lambda p: "/" + p[1:].replace("/", "%2F"),
    "doubly encoded slash": lambda p: "/v1/..%252f" + p[1:].replace("/", "%252f"),
    "doubly encoded up": lambda p: "/v1/%252e%252e" + p,
    "double slash": lambda p: "/" + p,
    "double slashes": lambda p: p.replace("/", "//"),
    "parameter": lambda p: p + ";x",
    "parameter before": lambda p: "/;x" + p,
    "tomcat's up": lambda p: "/v1/chat/completions/..;/..;/..;" + p,
    "trailing slash": lambda p: p + "/",
    "trailing slashes": lambda p: p + "//",
    "upper case": str.upper,
    "title case": str.title,
    "backslashes": lambda p: p.replace("/", "\\"),
    "backslash up": lambda p: "/v1\\..\\" + p[1:],
    "encoded backslash": lambda p: "/v1/..%5c" + p[1:].replace("/", "%5c"),
    "nul at the end": lambda p: p + "%00",
    "nul and a listed path": lambda p: p + "%00/v1/chat/completions",
    "listed path and nul": lambda p: "/v1/chat/completions%00" + p,
    "overlong slash": lambda p: "/v1/..%c0%af" + p[1:],
    "overlong dots": lambda p: "/v1/%c0%ae%c0%ae" + p,
    "full width": lambda p: "/v1/%ef%bc%8e%ef%bc%8e" + p,
    "query": lambda p: p + "?x=/v1/chat/completions",
    "empty query": lambda p: p + "?",
    "fragment": lambda p: p + "#/v1/chat/completions",
    "all letters encoded": percent,
    "one letter encoded": lambda p: p[:1] + percent(p[1:2] or "x") + p[2:],
    "encoded space": lambda p: p + "%20",
    "tab": lambda p: p + "%09",
    "line end": lambda p: p + "%0d%0aX-A:%20b",
    "extension": lambda p: p + ".json",
    "dot at the end": lambda p: p + ".",
    "tilde": lambda p: p + "~",
    "absolute": lambda p: "http://backend" + p,
    "authority": lambda p: "//backend" + p,
    "no slash": lambda p: p[1:] or "*",
    "bare percent": lambda p: p + "%",
    "bad percent": lambda p: p + "%zz",
    "raw bytes": lambda p: p + "\xc0\xaf",
    "star": lambda p: "*" + p,
}
METHODS = ["GET", "POST"]
MORE_METHODS = ["HEAD", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PURGE", "post", "QUERY"]
#: What a request gets that leads nowhere.
NOWHERE = {400, 404, 405}


class Case(NamedTuple):
    """A request that leads nowhere."""

    trick: str
    method: str
    target: str

    def raw(self) -> bytes:
        return request_bytes(self.method, self.target, b"{}")


def is_taken(method: str, target: str) -> bool:
    """Whether it is a listed path after all, as it is written."""
    path = target.partition("?")[0]
    listed = method == "POST" and path in ENDPOINTS
    return listed or (method in ("GET", "HEAD") and path == MODELS.decode())


def cases() -> Iterator[Case]:
    for trick, written in TRICKS.items():
        for path in (*DANGEROUS, *LISTED):
            for method in METHODS + MORE_METHODS * LONG:
                target = written(path)
                if not is_taken(method, target):
                    yield Case(trick, method, target)


# --- in memory ------------------------------------------------------------------------------------


class Exchange:
    """In the place of the real one: notes that a request got as far."""

    reached: list[bytes]

    def __init__(self, endpoint: Any, request: Request, services: Any) -> None:
        self._request = request
        self.reached.append(request.uri)

    async def run(self) -> None:
        self._request.answer(200, [], b"")


class NoModels:
    """Services for the list of models: each key is valid, and no model is there."""

    config = Config()

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.authenticator = self
        self.backends = Backends(Mock(), clock)

    async def authenticate(self, *args: object) -> Account:
        return Account("key")


def site_without_backends(clock: Clock) -> Server:
    return Server(clock, root=make_root(cast(Services, NoModels(clock)), 0))


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The targets of the requests that came to be served."""
    found: list[bytes] = []
    monkeypatch.setattr(resource, "Exchange", type("Spy", (Exchange,), {"reached": found}))
    return found


def answer_to(server: Server, raw: bytes) -> int:
    """The status of the answer, on the connection that is there or on a new one."""
    if not server.wire.connected or server.wire.disconnecting:
        server.clock.advance(60)
        server.connect()
    server.wire.clear()
    server.send(raw)
    server.clock.advance(0)
    return Answer(server.sent).status


def test_no_path_but_the_listed_ones_leads_anywhere(clock: Clock, reached: list[bytes]) -> None:
    server = site_without_backends(clock)
    verdicts = Tally("paths")
    for case in cases():
        status = answer_to(server, case.raw())
        name = f"{case.trick}: {case.method} {case.target}"
        verdicts.add(name, status in NOWHERE and not reached, f"{status}")
        reached.clear()
    server.leave()
    clock.advance(60)
    verdicts.check(at_least=10_000)


def test_the_listed_paths_lead_somewhere_with_their_own_method_alone(
    clock: Clock, reached: list[bytes]
) -> None:
    server = site_without_backends(clock)
    for path in LISTED:
        for target in (path, f"{path}?", f"{path}?model=x&/../metrics", f"{path}?api-version=1"):
            assert answer_to(server, request_bytes("POST", target, b"{}")) == 200
            assert reached == [target.encode()]
            reached.clear()
        for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE"):
            assert answer_to(server, request_bytes(method, path)) == 405, method
        assert reached == []
    for target in (MODELS.decode(), f"{MODELS.decode()}?x"):
        assert answer_to(server, request_bytes("GET", target)) == 200
        assert answer_to(server, request_bytes("POST", target, b"{}")) == 405
    server.leave()
    clock.advance(60)


# --- real sockets ---------------------------------------------------------------------------------

BODY = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "prompt": "a"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
CLOSE = {"Connection": "close"}  # a HEAD has no body to wait for


@pytest_twisted.ensureDeferred
async def test_a_backend_sees_nothing_of_other_paths(tmp_path: Path) -> None:
    chosen = random.Random(0).sample(list(cases()), 2000 if LONG else 150)
    body = orjson.dumps(BODY)
    verdicts = Tally("paths, over sockets")
    async with ScriptedBackend() as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for case in chosen:
                raw = request_bytes(case.method, case.target, body, fields=CLOSE)
                answer = await proxy.send(raw)
                verdicts.add(f"{case.trick}: {case.method} {case.target}", answer.status in NOWHERE)
            assert backend.requests == []
            assert proxy.rows() == []
    verdicts.check(at_least=100)


@pytest.mark.parametrize("query", ["?", "?a=b", "?model=other&api_base=http://a/", "?/../metrics"])
@pytest_twisted.ensureDeferred
async def test_a_backend_gets_no_query(tmp_path: Path, query: str) -> None:
    whole = json_answer(200, {"choices": [], "usage": USAGE})
    async with ScriptedBackend([whole]) as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            answer = await proxy.post(f"/v1/chat/completions{query}", BODY)
            assert answer.status == 200
            assert backend.requests[0].line == b"POST /v1/chat/completions HTTP/1.1"
            assert proxy.rows() == [("settled", "complete", 3, 2)]
