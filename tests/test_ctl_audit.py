"""`llmproxyctl audit`: counters, windows, and a real HTTP server with metrics."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from certificates import Authority
from ctl_tool import Tool

from llmproxy.config import Backend
from llmproxy.ctl import audit
from llmproxy.ctl.audit import COMPLETION, PROMPT, Billed, Increase, Tools
from llmproxy.ctl.common import CommandError

BACKEND = Backend(name="llama", url="http://gpu1:8000", device="H100")
START = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, capsys)


def metrics(prompt: float, completion: float, *labels: str) -> str:
    """As vLLM writes them."""
    lines = []
    for name, value in (("prompt", prompt), ("generation", completion)):
        lines.append(f"# HELP vllm:{name}_tokens_total Number of tokens.")
        lines.append(f"# TYPE vllm:{name}_tokens_total counter")
        for label in labels or ('engine="0",model_name="llama"',):
            lines.append(f"vllm:{name}_tokens_total{{{label}}} {value}")
    return "\n".join([*lines, "# TYPE up gauge", "up 1", ""])


def increase_over(*values: float) -> Increase:
    increase = Increase()
    for value in values:
        increase.add(audit.read_counters(metrics(value, 2 * value), BACKEND))
    return increase


@pytest.mark.parametrize(
    ("values", "total", "resets"),
    [
        ((5,), 0, 0),
        ((5, 5), 0, 0),
        ((5, 7, 10), 5, 0),
        ((5, 7, 3, 4), 6, 1),
        ((5, 0, 0, 2), 2, 1),
        ((9, 1, 8, 2, 3), 1 + 7 + 2 + 1, 2),
        ((1e6, 1.0001e6), 100, 0),
    ],
)
def test_increases_are_summed_over_resets(values: tuple[float], total: int, resets: int) -> None:
    increase = increase_over(*values)
    assert increase.totals == {PROMPT: total, COMPLETION: 2 * total}
    assert increase.resets == resets


def test_series_are_followed_one_by_one() -> None:
    first, second = 'engine="0",model_name="llama"', 'engine="1",model_name="llama"'
    increase = Increase()
    increase.add(audit.read_counters(metrics(5, 5, first), BACKEND))
    increase.add(audit.read_counters(metrics(7, 8, first, second), BACKEND))
    assert increase.totals == {PROMPT: 2 + 7, COMPLETION: 3 + 8}
    assert increase.resets == 0


def test_only_the_counters_of_the_model_count() -> None:
    text = metrics(5, 6, 'model_name="llama"', 'model_name="other"')
    assert sorted(audit.read_counters(text, BACKEND).values()) == [5, 6]


def test_the_model_is_looked_for_by_the_backends_own_name() -> None:
    backend = Backend(name="llama", url="http://h", device="d", model="own")
    text = metrics(5, 6, 'model_name="llama"', 'model_name="own"')
    ((_, labels),) = {key for key in audit.read_counters(text, backend) if key[0] == PROMPT}
    assert labels == (("model_name", "own"),)


def test_the_only_model_of_a_server_may_have_any_name() -> None:
    assert len(audit.read_counters(metrics(5, 6, 'model_name="x"'), BACKEND)) == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "has no vllm:prompt_tokens_total: is it vLLM?"),
        ("up 1\n", "has no vllm:prompt_tokens_total: is it vLLM?"),
        (metrics(1, 1).replace("generation", "x"), "has no vllm:prompt_tokens_total"),
        ("<html>no metrics</html>", "can't be read"),
        (metrics(1, 1, 'model_name="a"', 'model_name="a2"'), "has no llama, but a"),
    ],
)
def test_metrics_without_the_counters_are_refused(text: str, error: str) -> None:
    with pytest.raises(CommandError, match=error):
        audit.read_counters(text, BACKEND)


class World:
    """A clock that moves by sleeping, a backend's counters, and things that happen in time."""

    def __init__(self, tool: Tool) -> None:
        self.seconds = 0.0
        self.prompt = self.completion = 100
        self.fetches = 0
        self.fail_at: set[int] = set()
        self.plan: list[tuple[float, Callable[[], None]]] = []
        self.tool = tool
        self.tools = Tools(self.fetch, self.now, lambda: self.seconds, self.sleep)

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        while self.plan and self.plan[0][0] <= self.seconds:
            self.plan.pop(0)[1]()

    def fetch(self, backend: Backend) -> str:
        self.fetches += 1
        if self.fetches in self.fail_at:
            raise CommandError("planted")
        return metrics(self.prompt, self.completion)

    def at(self, seconds: float) -> str:
        return (START + timedelta(seconds=seconds)).isoformat(timespec="microseconds")

    def serve(self, rid: str, opened: float, finished: float, **columns: object) -> None:
        """A request of 10 and 20 tokens, counted when it is finished."""

        def finish() -> None:
            self.prompt += 10
            self.completion += 20
            self.tool.query("DELETE FROM ledger WHERE rid = ?", rid)
            row = {"prompt": 10, "completion": 20} | columns
            self.tool.add_row(rid, opened=self.at(opened), finished=self.at(finished), **row)

        def start() -> None:
            self.tool.add_row(rid, opened=self.at(opened), finished=None, state="open")

        self.plan += [(opened, start), (finished, finish)]
        self.plan.sort(key=lambda step: step[0])
        if opened < 0:
            self.plan.pop(0)[1]()

    def watch(self, wait_s: float = 60.0) -> tuple[Increase, Billed]:
        connection = self.tool.store()
        try:
            return audit.watch(
                connection, BACKEND, self.tools, watch_s=60, interval_s=10, wait_s=wait_s
            )
        finally:
            connection.close()


@pytest.fixture
def world(tool: Tool) -> World:
    return World(tool)


def test_what_was_billed_in_the_window_equals_what_was_counted(world: World) -> None:
    world.serve("r1", 5, 7)
    world.serve("r2", 20, 50)
    increase, billed = world.watch()
    assert increase.totals == {PROMPT: 20, COMPLETION: 40}
    assert billed == Billed(prompt=20, completion=40, requests=2, unresolved=0, edges=0)


def test_requests_in_flight_at_the_end_are_waited_for(world: World) -> None:
    world.serve("r1", 55, 70)
    increase, billed = world.watch()
    assert increase.totals == {PROMPT: 10, COMPLETION: 20}
    assert (billed.prompt, billed.edges) == (10, 0)
    assert world.seconds < 75


def test_the_wait_for_requests_in_flight_is_bounded(world: World) -> None:
    world.serve("r1", 55, 1000)
    _, billed = world.watch(wait_s=20)
    assert billed == Billed(prompt=0, completion=0, requests=0, unresolved=0, edges=1)
    assert 80 <= world.seconds < 85


def test_requests_in_flight_at_the_start_are_told(world: World) -> None:
    world.serve("r1", -5, 10)
    increase, billed = world.watch()
    assert (billed.prompt, billed.edges) == (0, 1)
    assert increase.totals[PROMPT] == 10


def test_rows_that_wait_for_the_operator_are_told(world: World) -> None:
    world.serve("r1", 5, 7, state="disputed", prompt=None, completion=None)
    increase, billed = world.watch()
    assert (billed.prompt, billed.unresolved, increase.totals[PROMPT]) == (0, 1, 10)


def test_other_backends_and_other_times_are_not_summed(world: World) -> None:
    others: tuple[tuple[str, dict[str, object]], ...] = (
        ("r1", {"model": "other"}),
        ("r2", {"device": "A100"}),
        ("r3", {"opened": world.at(-100), "finished": world.at(-90)}),
    )
    for rid, columns in others:
        row: dict[str, object] = {"opened": world.at(5), "finished": world.at(6)} | columns
        world.tool.add_row(rid, prompt=1, completion=1, **row)
    assert world.watch()[1].requests == 0


def test_embeddings_count_as_prompts(world: World) -> None:
    world.serve("r1", 5, 7, prompt=None, completion=None, embedding=10)
    assert world.watch()[1].prompt == 10


def test_a_missing_sample_in_between_is_survived(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.serve("r1", 5, 7)
    world.fail_at = {2, 3}
    assert world.watch()[0].totals[PROMPT] == 10
    assert "a sample is missing: planted" in capsys.readouterr().err


def test_the_first_sample_is_needed(world: World) -> None:
    world.fail_at = {1}
    with pytest.raises(CommandError, match="planted"):
        world.watch()


class Metrics(BaseHTTPRequestHandler):
    """A backend's /metrics; `rising` adds to the counters at each request."""

    count: ClassVar[int] = 0
    rising: ClassVar[int] = 0
    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        cls = type(self)
        cls.seen.append((self.path, self.headers["Authorization"]))
        if self.path != "/metrics":
            self.send_response(302)
            self.send_header("Location", "/metrics")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        cls.count += cls.rising
        body = metrics(cls.count, cls.count).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def served(tool: Tool) -> Iterator[type[Metrics]]:
    class Handler(Metrics):
        seen: ClassVar[list[tuple[str, str | None]]] = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        tool.configure(
            f'[backends.llama]\nurl = "{url}/v1"\ndevice = "H100"\ntoken = "s3cret"\n'
            f'[backends.moved]\nurl = "{url}/old"\ndevice = "H100"\ntoken = "s3cret"\n'
        )
        yield Handler
        server.shutdown()
        thread.join()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setattr(audit, "LAG_S", 0.01)
    return ("--watch", "0.05", "--interval", "0.02")


def test_an_equal_bill_ends_with_0(
    tool: Tool, served: type[Metrics], short: tuple[str, ...]
) -> None:
    assert tool.run("audit", "llama", *short).splitlines() == [
        "TOKENS      BILLED  COUNTED  DIFFERENCE",
        "prompt           0        0           0",
        "completion       0        0           0",
    ]
    assert set(served.seen) == {("/metrics", "Bearer s3cret")}
    assert len(served.seen) >= 3


def test_a_difference_is_named_and_ends_with_1(
    tool: Tool, served: type[Metrics], short: tuple[str, ...]
) -> None:
    served.rising = 5
    out = tool.run("audit", "llama", *short, "--format", "csv", code=1)
    counted = 5 * (len(served.seen) - 1)
    assert out.splitlines()[1] == f"prompt,0,{counted},{-counted}"


def test_a_redirect_is_not_followed(
    tool: Tool, served: type[Metrics], short: tuple[str, ...]
) -> None:
    tool.run("audit", "moved", *short, code=1)
    assert tool.err.endswith("/old/metrics answers with status 302\n")
    assert [path for path, _ in served.seen] == ["/old/metrics"]


def test_an_unknown_backend_is_refused(tool: Tool, short: tuple[str, ...]) -> None:
    tool.run("audit", "nobody", *short, code=1)
    assert tool.err == "llmproxyctl: no backend is called nobody\n"


def test_a_backend_that_is_down_is_one_line(tool: Tool, short: tuple[str, ...]) -> None:
    tool.configure('[backends.llama]\nurl = "http://127.0.0.1:1"\ndevice = "H100"\n')
    tool.run("audit", "llama", *short, code=1)
    assert tool.err.splitlines()[-1].startswith("llmproxyctl: http://127.0.0.1:1/metrics: ")


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "inf"])
def test_a_watch_needs_seconds(tool: Tool, seconds: str) -> None:
    tool.run("audit", "llama", f"--watch={seconds}", code=2)
    assert "not a number of seconds above 0" in tool.err


def test_a_backend_with_tls_is_asked_as_the_proxy_does(
    tmp_path: Path, served: type[Metrics]
) -> None:
    ours, theirs = Authority(tmp_path), Authority(tmp_path, "theirs")
    shown = ours.issue("client", "llmproxyctl.example")
    issued = theirs.issue("server", "127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ours.path)
    context.load_cert_chain(issued.cert, issued.key)
    context.verify_mode = ssl.CERT_REQUIRED
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"https://127.0.0.1:{server.server_port}"
        backend = replace(BACKEND, url=url, ca=theirs.path.read_text())
        known = replace(
            backend, client_cert=shown.cert.read_text(), client_key=shown.key.read_text()
        )
        assert PROMPT in audit.fetch(known)
        for refused in (backend, replace(known, ca=ours.path.read_text())):
            with pytest.raises(CommandError, match="https://"):
                audit.fetch(refused)
        server.shutdown()
        thread.join()
