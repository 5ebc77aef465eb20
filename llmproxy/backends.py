"""Which servers have a model: a snapshot of the configuration, and what is known of each server.

find(model) --> Model: all that is shared by its servers
                  |--> choose() --> Route: one server, its connections, how it does
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from twisted.internet.interfaces import IReactorTime

from llmproxy.balancing import Balancer, Standing
from llmproxy.config import Backend, Replica, member, servers_of
from llmproxy.errors import ModelNotFound
from llmproxy.queueing import FairQueue
from llmproxy.upstream import Upstream


class Route(Standing):
    """A server, as if it were its backend's only one, and the connections to it.

    Exchanges keep the route that they began with.
    """

    __slots__ = ("backend", "upstream")

    def __init__(self, backend: Backend, upstream: Upstream, weight: int = 1) -> None:
        super().__init__(
            backend.url,
            weight=weight,
            failures=backend.circuit_failures,
            pause_s=backend.circuit_pause,
        )
        self.backend = backend
        self.upstream = upstream


class Model:
    """What clients ask for: its servers, who is next, and who waits."""

    __slots__ = ("_balancer", "backend", "queue", "routes")

    def __init__(self, backend: Backend, routes: Sequence[Route], queue: FairQueue) -> None:
        self.backend = backend
        self.routes = routes
        self.queue = queue
        self._balancer = Balancer(backend.policy)

    def choose(
        self, now: float, *, affinity: bytes = b"", tried: Collection[Route] = ()
    ) -> Route | None:
        """The server for the next request; None if all were `tried`. See `Balancer.choose`."""
        if len(self.routes) == 1:
            return None if tried else self.routes[0]
        return self._balancer.choose(self.routes, now, affinity=affinity, tried=tried)


#: What a server is known by: the model's name, and the server's URL.
Server = tuple[str, str]


class Backends:
    """The models in force; `swap` replaces them all at once."""

    def __init__(self, connect: Callable[[Backend], Upstream], clock: IReactorTime) -> None:
        self._connect = connect
        self._clock = clock
        self._models: dict[str, Model] = {}
        self._down: Collection[Server] = ()
        self._by_any_name: dict[str, Model] = {}

    def find(self, name: str, allowed: Collection[str] | None = None) -> Model:
        """The model that a client named, by its name or an alias.

        `allowed`: what the client may ask for; who may have a model may have it by its aliases too.
        Raises ModelNotFound.
        """
        model = self._by_any_name.get(name)
        if model is None or not _may_have(name, model.backend, allowed):
            raise ModelNotFound("The model does not exist or you can't use it.", param="model")
        return model

    def listed(self, allowed: Collection[str] | None = None) -> Iterable[tuple[str, Backend]]:
        """All names and aliases that a client may ask for, with their backends."""
        found = self._by_any_name.items()
        return [(name, m.backend) for name, m in found if _may_have(name, m.backend, allowed)]

    def all(self) -> Iterable[Backend]:
        """The backends in force, in the order of the configuration."""
        return [model.backend for model in self._models.values()]

    def models(self) -> Iterable[Model]:
        """The models in force."""
        return self._models.values()

    def routes(self) -> dict[Server, Route]:
        """All servers."""
        return {
            (model.backend.name, route.backend.url): route
            for model in self._models.values()
            for route in model.routes
        }

    def swap(self, backends: Mapping[str, Backend]) -> None:
        """Put a new configuration in force; what is known of unchanged servers, and the connections
        to them, are kept, and so are those who wait for a model.

        What `connect` raises comes through, and nothing has changed then.
        """
        old = self.routes()
        fresh = {
            name: [self._route(old, backend, server) for server in servers_of(backend)]
            for name, backend in backends.items()
        }
        self._models = {
            name: self._model(backend, fresh[name]) for name, backend in backends.items()
        }
        self._by_any_name = {
            name: model
            for model in self._models.values()
            for name in (model.backend.name, *model.backend.aliases)
        }
        self.set_down(self._down)
        kept = set(self.routes().values())
        for route in old.values():
            if route not in kept:
                route.upstream.close()

    def _route(self, old: Mapping[Server, Route], backend: Backend, server: Replica) -> Route:
        alone = member(backend, server)
        kept = old.get((alone.name, alone.url))
        if kept is not None and kept.backend == alone:
            return kept
        return Route(alone, self._connect(alone))

    def _model(self, backend: Backend, routes: Sequence[Route]) -> Model:
        for route, server in zip(routes, servers_of(backend), strict=True):
            route.weight = server.weight
        old = self._models.get(backend.name)
        queue = old.queue if old is not None else FairQueue(self._clock)
        queue.most, queue.size = backend.max_concurrent, backend.queue_size
        queue.timeout_s = backend.queue_timeout
        queue.let_in()
        return Model(backend, routes, queue)

    def set_down(self, down: Collection[Server]) -> None:
        """These servers did not pass their last health check: others go first."""
        self._down = down
        for server, route in self.routes().items():
            route.up = server not in down

    def close(self) -> None:
        """Close all idle connections."""
        for route in self.routes().values():
            route.upstream.close()


def _may_have(name: str, backend: Backend, allowed: Collection[str] | None) -> bool:
    return allowed is None or name in allowed or backend.name in allowed
