"""schemathesis makes requests of docs/openapi.yaml, such as it allows and others, on real sockets.

Each answer must have a status, a type, fields and a body that the description has for its path,
what breaks the description must be refused, and nothing may be a fault of ours. The stand-in server
is behind it, so that what is understood goes all the way.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import requests
import schemathesis
import yaml
from clients import BACKEND_TOKEN, listening
from hypothesis import HealthCheck, Phase, given, seed, settings
from proxy import KEY, ProxyHandle, running_proxy
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks
from tally import LONG, Tally
from twisted.internet.threads import deferToThread

from llmproxy.demo import SAMPLE_BACKENDS, DemoServer

DESCRIPTION = yaml.safe_load((Path(__file__).parents[2] / "docs" / "openapi.yaml").read_text())
ADMIN = [path for path in DESCRIPTION["paths"] if "servers" in DESCRIPTION["paths"][path]]
#: Requests of each kind for each method of a path.
EXAMPLES = 400 if LONG else 6
CHECKS: list[Any] = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
]
#: How a request may be refused that breaks the description.
REFUSED = [400, 401, 404, 405, 413, 414, 415, 422, 431]


@dataclass(frozen=True)
class Setting:
    server: DemoServer
    proxy: ProxyHandle


@pytest_twisted.async_yield_fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    server = DemoServer(token=BACKEND_TOKEN)
    async with listening(server) as direct:
        tables = {
            name: {**table, "url": direct.url, "token": BACKEND_TOKEN}
            for name, table in SAMPLE_BACKENDS.items()
        }
        async with running_proxy(tmp_path, tables, failed_keys_per_minute=0) as proxy:
            yield Setting(server, proxy)


def narrowed(description: dict[str, Any]) -> dict[str, Any]:
    """Models are those that are served: else nearly all requests would end with their model."""
    narrow = copy.deepcopy(description)
    schemas = narrow["components"]["schemas"]
    schemas["ModelName"] = {"enum": list(SAMPLE_BACKENDS)}
    # schemathesis 4.32 can't look for fields by a pattern where one of them is a file.
    del schemas["AudioForm"]["patternProperties"]
    return narrow


def operations(description: dict[str, Any], *, admin: bool) -> list[Any]:
    schema: Any = schemathesis.openapi.from_dict(description)
    schema.config.generation.with_security_parameters = False  # keys are ours to send
    schema.config.checks.negative_data_rejection.expected_statuses = list(map(str, REFUSED))
    found = [each.ok() for each in schema.get_all_operations()]
    return [each for each in found if (each.path in ADMIN) == admin]


def covering(operation: Any) -> Iterator[Case]:
    """Every boundary of the schemas, every way to break them, other methods; each time the same."""
    config = operation.schema.config.generation
    yield from operation.schema.iter_coverage_cases(
        operation=operation, generation_modes=list(GenerationMode), generation_config=config
    )


def drawn(operation: Any, mode: GenerationMode, act: Callable[[Case], None]) -> None:
    """`EXAMPLES` of hypothesis' making; each time the same."""

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        act(case)

    run()


def examples(path: str) -> list[dict[str, Any]]:
    """The bodies that the description has for a path."""
    content = DESCRIPTION["paths"][path].get("post", {}).get("requestBody", {}).get("content", {})
    found = content.get("application/json", {}).get("examples", {})
    return [example["value"] for example in found.values()]


def complete(case: Case) -> None:
    """Add what the stand-in server needs and the proxy does not look at.

    Else the server's refusals would hide what the proxy lets pass.
    """
    if isinstance(case.body, dict) and (known := examples(case.path)):
        unread = {name: value for name, value in known[0].items() if name != "model"}
        case.body = unread | case.body


class Examiner:
    """Sends requests, and counts in `tally` which of them were answered as described."""

    def __init__(self, url: str, tally: Tally, key: str | None = KEY) -> None:
        self.url = url
        self.tally = tally
        self.statuses: set[int] = set()
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._session = requests.Session()
        self._session.trust_env = False

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._session.close()

    def __call__(self, case: Case) -> None:
        """Send one."""
        complete(case)
        answer = case.call(base_url=self.url, session=self._session, headers=self._headers)
        self.statuses.add(answer.status_code)
        try:
            case.validate_response(answer, checks=CHECKS)
            why = ""
        except FailureGroup as failures:
            said = "; ".join(f"{each.title}: {each.message}" for each in failures.exceptions)
            why = f"{answer.status_code} {said}\n{case.as_curl_command()}"
        self.tally.add(f"{case.method} {case.path}", not why, why)


def examine(url: str, tally: Tally, *, admin: bool) -> set[int]:
    """All kinds of requests to one of the sites; the statuses of the answers."""
    with Examiner(url, tally) as examiner:
        for operation in operations(narrowed(DESCRIPTION), admin=admin):
            for case in covering(operation):
                examiner(case)
            drawn(operation, GenerationMode.POSITIVE, examiner)
            if operation.body:
                drawn(operation, GenerationMode.NEGATIVE, examiner)
        return examiner.statuses


@pytest.mark.timeout(3600 if LONG else 120)
@pytest_twisted.ensureDeferred
async def test_the_public_site_answers_as_described(setting: Setting) -> None:
    tally = Tally("schemathesis, public site")
    statuses = await deferToThread(examine, setting.proxy.url, tally, admin=False)
    tally.check(at_least=600)
    assert {200, 204, 400, 404, 405, 415} <= statuses
    await setting.proxy.settled()
    rows = setting.proxy.rows("state, status")
    assert {state for state, _ in rows} == {"settled"}
    # Forms that turned out to be none when they were half sent have a row, and no answer.
    answered = [status for _, status in rows if status is not None]
    assert len(answered) == len(setting.server.journal) > 200


@pytest_twisted.ensureDeferred
async def test_the_admin_site_answers_as_described(setting: Setting) -> None:
    tally = Tally("schemathesis, admin site")
    url = f"http://127.0.0.1:{setting.proxy.admin_port}"
    statuses = await deferToThread(examine, url, tally, admin=True)
    tally.check(at_least=20)
    assert statuses == {200, 405}


def without_key(url: str, tally: Tally) -> set[int]:
    with Examiner(url, tally, key=None) as examiner:
        for operation in operations(narrowed(DESCRIPTION), admin=False):
            if operation.method != "options":
                for case in covering(operation):
                    if case.method == operation.method.upper():
                        examiner(case)
        return examiner.statuses


@pytest_twisted.ensureDeferred
async def test_nothing_but_the_key_is_looked_at_where_there_is_none(setting: Setting) -> None:
    tally = Tally("schemathesis, without a key")
    statuses = await deferToThread(without_key, setting.proxy.url, tally)
    tally.check(at_least=400)
    assert statuses == {401}
    assert not setting.server.journal
    assert not setting.proxy.rows()


@pytest_twisted.ensureDeferred
async def test_its_examples_are_served(setting: Setting) -> None:
    for path in DESCRIPTION["paths"]:
        for body in examples(path):
            answer = await setting.proxy.post(path, body)
            assert (answer.status, answer.whole) == (200, True), path
