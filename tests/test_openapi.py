"""docs/openapi.yaml: it is valid, and says of each path, status and code what the code does."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from openapi_spec_validator import OpenAPIV31SpecValidator

from llmproxy import __version__, audio, dialects, errors, headers, policy, rewrite, survey
from llmproxy.admin import admin_resource
from llmproxy.endpoints import ENDPOINTS, Body, Dialect, Endpoint
from llmproxy.errors import ProxyError
from llmproxy.resource import MODELS, USAGE

ROOT = Path(__file__).parent.parent
DESCRIPTION: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
PATHS: dict[str, Any] = DESCRIPTION["paths"]
SCHEMAS: dict[str, Any] = DESCRIPTION["components"]["schemas"]
KEYED_PATHS = (MODELS.decode(), f"{MODELS.decode()}/{{id}}", USAGE.decode())
#: Statuses that a request which is not forwarded can't get from us.
OF_FORWARDED = {402, 413, 415, 502, 504}
BODIES = {Body.JSON: "application/json", Body.MULTIPART: "multipart/form-data"}


def test_it_is_valid() -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(DESCRIPTION).iter_errors()] == []


def test_the_package_has_the_same_as_json() -> None:
    # After a change: make openapi
    packed = json.loads((ROOT / "llmproxy" / "openapi.json").read_text())
    assert packed == DESCRIPTION


def test_it_is_of_this_version() -> None:
    assert DESCRIPTION["info"]["version"] == __version__


# Paths


def admin_paths() -> set[str]:
    root: Any = admin_resource(dict, dict, lambda: b"")
    return {f"/{name.decode()}" for name in root.children[b""].children}


def test_it_has_every_path_and_no_other() -> None:
    assert PATHS.keys() == {*ENDPOINTS, *KEYED_PATHS, *admin_paths()}


def methods(path: str) -> set[str]:
    return PATHS[path].keys() - {"parameters", "servers"}


def test_it_has_every_method_and_no_other() -> None:
    assert all(methods(path) == {"post", "options"} for path in ENDPOINTS)
    assert all(methods(path) == {"get", "head", "options"} for path in KEYED_PATHS)
    assert all(methods(path) == {"get", "head"} for path in admin_paths())


def test_the_admin_site_is_another_server() -> None:
    assert {path for path in PATHS if "servers" in PATHS[path]} == admin_paths()


# Requests


@pytest.fixture(params=ENDPOINTS.values(), ids=lambda endpoint: endpoint.path)
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    return request.param


def content(endpoint: Endpoint) -> dict[str, Any]:
    return PATHS[endpoint.path]["post"]["requestBody"]["content"]


def resolved(value: Any) -> Any:
    while isinstance(value, dict) and "$ref" in value:
        found: Any = DESCRIPTION
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        value = found
    return value


def fields(schema: Any) -> dict[str, Any]:
    """The properties of an object's schema, also where it is made of several."""
    schema = resolved(schema)
    found = dict(schema.get("properties", {}))
    for part in schema.get("allOf", ()):
        found |= fields(part)
    return {name: resolved(value) for name, value in found.items()}


def test_bodies_have_the_type_that_is_taken(endpoint: Endpoint) -> None:
    assert content(endpoint).keys() == {BODIES[endpoint.body]}


def test_it_says_where_a_stream_can_be_had(endpoint: Endpoint) -> None:
    [body] = content(endpoint).values()
    stream = fields(body["schema"])["stream"]
    assert (stream.get("type") == "boolean") == endpoint.streams
    answers = PATHS[endpoint.path]["post"]["responses"]["200"]["content"]
    assert ("text/event-stream" in answers) == endpoint.streams


def test_examples_are_understood(endpoint: Endpoint) -> None:
    for example in content(endpoint)[BODIES[endpoint.body]].get("examples", {}).values():
        rewrite.plan(endpoint, json.dumps(example["value"]).encode())


def test_limits_are_ours() -> None:
    assert SCHEMAS["ModelName"]["maxLength"] == rewrite.MAX_MODEL == audio.MAX_MODEL
    assert f"{survey.MAX_VALUES:,} values" in SCHEMAS["Request"]["description"]
    form = fields(SCHEMAS["AudioForm"])
    assert tuple(form["response_format"]["enum"]) == audio.RESPONSE_FORMATS


@pytest.mark.parametrize(
    ("name", "refused"), [("Request", policy.REFUSED), ("AudioForm", policy.REFUSED_IN_FORMS)]
)
def test_fields_that_no_backend_gets_are_named(name: str, refused: dict[str, str]) -> None:
    [pattern] = SCHEMAS[name]["patternProperties"]
    assert pattern == f"^({'|'.join(refused)})$"


def test_keys_are_where_they_are_looked_for() -> None:
    anthropic: Any = [{"bearer": []}, {"x_api_key": []}]
    for path in ENDPOINTS:
        said = PATHS[path]["post"].get("security", DESCRIPTION["security"])
        is_anthropic = ENDPOINTS[path].dialect is Dialect.ANTHROPIC
        assert said == (anthropic if is_anthropic else anthropic[:1])
    for path in KEYED_PATHS:
        assert PATHS[path]["get"]["security"] == PATHS[path]["head"]["security"] == anthropic
    for path in admin_paths():
        assert PATHS[path]["get"]["security"] == PATHS[path]["head"]["security"] == []


# Answers


def kinds_of_error() -> Iterator[type[ProxyError]]:
    waiting = [ProxyError]
    while waiting:
        kind = waiting.pop()
        if kind.__module__ == errors.__name__:
            yield kind
        waiting += kind.__subclasses__()


def codes_in_calls() -> Iterator[str]:
    """Texts that are given as `code` in a call, anywhere in the package."""
    for path in (ROOT / "llmproxy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.keyword(arg="code", value=ast.Constant(value=str(code))):
                    yield code


STATUSES = {kind.status for kind in kinds_of_error()}


def test_every_status_is_there(endpoint: Endpoint) -> None:
    said = PATHS[endpoint.path]["post"]["responses"].keys() - {"200", "4XX"}
    assert {int(status) for status in said} == STATUSES


@pytest.mark.parametrize("path", KEYED_PATHS)
def test_every_status_of_our_own_answers_is_there(path: str) -> None:
    said = {int(status) for status in PATHS[path]["get"]["responses"]}
    assert said | {404} == {200} | STATUSES - OF_FORWARDED


def test_every_code_is_there_and_no_other() -> None:
    codes = {kind.code for kind in kinds_of_error()} | set(codes_in_calls())
    assert set(SCHEMAS["ErrorCode"]["enum"]) == codes


@pytest.mark.parametrize(
    ("dialect", "name"),
    [(Dialect.OPENAI, "OpenAIErrorType"), (Dialect.ANTHROPIC, "AnthropicErrorType")],
)
def test_every_type_of_error_is_there(dialect: Dialect, name: str) -> None:
    told = {
        json.loads(dialects.error_body(dialect, ProxyError("", status=status)))["error"]["type"]
        for status in {*STATUSES, 403}
    }
    assert set(SCHEMAS[name]["enum"]) == told


def shapes(response: Any) -> set[str]:
    """The names of the schemas that an answer's JSON may have."""
    schema = resolved(response)["content"]["application/json"]["schema"]
    return {part["$ref"].rpartition("/")[2] for part in resolved(schema).get("anyOf", (schema,))}


def test_errors_have_the_shape_of_the_dialect(endpoint: Endpoint) -> None:
    ours = "AnthropicError" if endpoint.dialect is Dialect.ANTHROPIC else "OpenAIError"
    before_the_path = {"400", "408", "414", "417", "429", "431", "500", "503"}
    for status, response in PATHS[endpoint.path]["post"]["responses"].items():
        if status in ("200", "4XX"):
            continue
        assert ours in shapes(response) or status in before_the_path
        assert shapes(response) <= ({ours, "OpenAIError"} if status in before_the_path else {ours})


def test_fields_of_errors_are_there() -> None:
    for kind in (
        errors.InvalidKey(),
        errors.InsufficientQuota("", wait_s=1),
        errors.TooManyRequests("", wait_s=1),
        errors.Unavailable(""),
    ):
        for path in ENDPOINTS:
            response = resolved(PATHS[path]["post"]["responses"][str(kind.status)])
            assert kind.headers.keys() <= response["headers"].keys()


def test_fields_that_are_passed_on_are_there() -> None:
    assert b"Retry-After" in headers.TO_CLIENT
    for path in ENDPOINTS:
        assert "Retry-After" in resolved(PATHS[path]["post"]["responses"]["429"])["headers"]


def test_every_answer_of_the_public_site_has_an_id() -> None:
    for path in PATHS.keys() - admin_paths():
        for method in methods(path):
            for response in PATHS[path][method]["responses"].values():
                assert "X-Request-ID" in resolved(response)["headers"]
