"""Routes: the snapshot in force, and what of the old one lives on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from twisted.internet.task import Clock

from llmproxy.backends import Backends, Route
from llmproxy.config import Backend, Replica
from llmproxy.errors import ConfigError, ModelNotFound
from llmproxy.upstream import Upstream


class Connections:
    """Stands for an `Upstream`."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Connector:
    """Connects, and keeps what it connected."""

    def __init__(self) -> None:
        self.made: list[tuple[Backend, Connections]] = []

    def __call__(self, backend: Backend) -> Upstream:
        self.made.append((backend, Connections()))
        return cast(Upstream, self.made[-1][1])


def backend(name: str, **more: Any) -> Backend:
    return Backend(**{"name": name, "url": "http://h:1", "device": "gpu", **more})


def route(backends: Backends, name: str) -> Route:
    """The first server."""
    return backends.find(name).routes[0]


A, B = backend("a"), backend("b")


@pytest.fixture
def connect() -> Connector:
    return Connector()


@pytest.fixture
def backends(connect: Connector) -> Backends:
    backends = Backends(connect, Clock())
    backends.swap({"a": A, "b": B})
    return backends


@pytest.mark.parametrize("name", ["", "c", "A", " a", "a/", "../a"])
def test_only_a_models_exact_name_finds_it(backends, name):
    assert backends.find("a").backend is A
    with pytest.raises(ModelNotFound) as caught:
        backends.find(name)
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_a_model_has_its_aliases_too(connect):
    backends = Backends(connect, Clock())
    backends.swap({"a": backend("a", aliases=("x", "y")), "b": B})
    assert backends.find("x") is backends.find("a") is backends.find("y")
    assert [(name, each.name) for name, each in backends.listed()] == [
        ("a", "a"),
        ("x", "a"),
        ("y", "a"),
        ("b", "b"),
    ]
    backends.swap({"a": A, "b": backend("b", aliases=("x",))})
    assert backends.find("x") is backends.find("b")
    with pytest.raises(ModelNotFound):
        backends.find("y")


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (None, ["a", "x", "y", "b"]),
        ({"a"}, ["a", "x", "y"]),
        ({"x"}, ["x"]),
        ({"b", "y"}, ["y", "b"]),
        ({"other"}, []),
        (set(), []),
    ],
)
def test_who_may_ask_for_some_models_finds_and_sees_no_others(connect, allowed, names):
    backends = Backends(connect, Clock())
    backends.swap({"a": backend("a", aliases=("x", "y")), "b": B})
    assert [name for name, _ in backends.listed(allowed)] == names
    for name in ("a", "x", "y", "b"):
        if name in names:
            backends.find(name, allowed)
        else:
            with pytest.raises(ModelNotFound):
                backends.find(name, allowed)


def test_backends_are_listed_in_the_order_of_the_configuration(backends):
    assert list(backends.all()) == [A, B]
    backends.swap({"b": B, "a": A})
    assert list(backends.all()) == [B, A]


def test_connections_to_a_backend_that_is_the_same_are_kept(backends, connect):
    before = route(backends, "a")
    backends.swap({"a": backend("a"), "b": B})  # equal, and not the same object
    assert route(backends, "a") is before
    assert [each.closed for _, each in connect.made] == [0, 0]


@pytest.mark.parametrize(
    "change",
    [{"url": "http://h:2"}, {"token": "t"}, {"verify_ssl": False}, {"drain_timeout": 1.0}],
)
def test_a_backend_that_was_changed_gets_connections_of_its_own(backends, connect, change):
    before = route(backends, "a")
    changed = replace(A, **change)
    backends.swap({"a": changed, "b": B})
    now = route(backends, "a")
    assert now.backend == changed
    assert now.upstream is not before.upstream
    assert [(each.name, used.closed) for each, used in connect.made] == [
        ("a", 1),
        ("b", 0),
        ("a", 0),
    ]


def test_what_can_t_be_connected_changes_nothing(connect):
    def fail_for_c(one: Backend) -> Upstream:
        if one.name == "c":
            raise ConfigError("no certificate")
        return connect(one)

    backends = Backends(fail_for_c, Clock())
    backends.swap({"a": A, "b": B})
    before = route(backends, "a")
    with pytest.raises(ConfigError):
        backends.swap({"b": replace(B, url="http://h:2"), "c": backend("c")})
    assert list(backends.all()) == [A, B]
    assert route(backends, "a") is before
    assert [used.closed for _, used in connect.made[:2]] == [0, 0]


def test_an_exchange_keeps_the_route_that_it_began_with(backends):
    begun = route(backends, "a")
    backends.swap({"a": replace(A, url="http://h:2")})
    assert begun.backend == A
    assert begun.upstream is not route(backends, "a").upstream


def test_a_backend_that_was_removed_is_not_found_and_its_idle_connections_are_closed(
    backends, connect
):
    backends.swap({"b": B})
    with pytest.raises(ModelNotFound):
        backends.find("a")
    assert [used.closed for _, used in connect.made] == [1, 0]


def test_closing_closes_what_is_in_force_once(backends, connect):
    backends.swap({"a": replace(A, url="http://h:2")})
    backends.close()
    assert [used.closed for _, used in connect.made] == [1, 1, 1]


# -- several servers ---------------------------------------------------------------------------

SEVERAL = backend("a", url="", urls=("http://h:1", "http://h:2"), token="t", policy="round_robin")


def test_a_model_may_have_several_servers_with_names_and_tokens_of_their_own(connect):
    backends = Backends(connect, Clock())
    own = Replica(url="http://h:2", token="own", model="theirs", weight=3)
    given = backend("a", url="", replicas=(Replica(url="http://h:1"), own), token="t", model="m")
    backends.swap({"a": given})
    first, second = backends.find("a").routes
    assert (first.backend.url, first.backend.token, first.backend.model) == ("http://h:1", "t", "m")
    assert (second.backend.url, second.backend.token) == ("http://h:2", "own")
    assert second.backend.model == "theirs"
    assert (first.weight, second.weight) == (1, 3)
    assert [made.url for made, _ in connect.made] == ["http://h:1", "http://h:2"]


def test_what_is_known_of_a_server_survives_a_reload(connect):
    backends = Backends(connect, Clock())
    backends.swap({"a": SEVERAL})
    before = list(backends.find("a").routes)
    before[0].enter()
    backends.set_down({("a", "http://h:2")})
    queue = backends.find("a").queue
    more = replace(
        SEVERAL,
        urls=("http://h:3", *SEVERAL.urls),
        policy="weighted",
        max_concurrent=7,
        queue_size=2,
    )
    backends.swap({"a": more})
    new, *kept = backends.find("a").routes
    assert kept == before
    assert (new.backend.url, new.up) == ("http://h:3", True)
    assert (kept[0].in_flight, kept[1].up) == (1, False)
    assert backends.find("a").queue is queue
    assert (queue.most, queue.size) == (7, 2)
    assert [used.closed for _, used in connect.made] == [0, 0, 0]
    backends.swap({"a": replace(SEVERAL, urls=("http://h:2",))})
    assert [used.closed for _, used in connect.made] == [1, 0, 1]


def test_a_reload_lets_in_who_waits_where_there_is_more_room(connect):
    backends = Backends(connect, Clock())
    backends.swap({"a": backend("a", max_concurrent=1, queue_size=5)})
    queue = backends.find("a").queue
    assert queue.enter_at_once()
    turn = queue.wait("k")
    assert not turn.called
    backends.swap({"a": backend("a", max_concurrent=2, queue_size=5)})
    assert turn.called


def test_one_server_is_chosen_once(backends):
    model = backends.find("a")
    assert model.choose(0.0) is model.routes[0]
    assert model.choose(0.0, tried=[model.routes[0]]) is None


def test_several_servers_are_chosen_by_the_policy(connect):
    backends = Backends(connect, Clock())
    backends.swap({"a": SEVERAL})
    model = backends.find("a")
    first, second = model.routes
    assert [model.choose(0.0) for _ in range(3)] == [first, second, first]
    assert model.choose(0.0, tried=[second]) is first
