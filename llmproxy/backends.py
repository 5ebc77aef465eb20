"""Which backend serves a model: a snapshot of the configuration, and the connections to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llmproxy.config import Backend
from llmproxy.errors import ModelNotFound
from llmproxy.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Route:
    """A backend and the connections to it. Exchanges keep the route that they began with."""

    backend: Backend
    upstream: Upstream


class Backends:
    """The routes in force; `swap` replaces them all at once."""

    def __init__(self, connect: Callable[[Backend], Upstream]) -> None:
        self._connect = connect
        self._routes: dict[str, Route] = {}

    def find(self, model: str) -> Route:
        """The route of the model that a client named. Raises ModelNotFound."""
        route = self._routes.get(model)
        if route is None:
            raise ModelNotFound("The model does not exist or you can't use it.", param="model")
        return route

    def all(self) -> Iterable[Backend]:
        """The backends in force, in the order of the configuration."""
        return [route.backend for route in self._routes.values()]

    def swap(self, backends: Mapping[str, Backend]) -> None:
        """Put a new configuration in force; connections to unchanged backends are kept.

        What `connect` raises comes through, and nothing has changed then.
        """
        fresh = {name: self._route(name, backend) for name, backend in backends.items()}
        old, self._routes = self._routes, fresh
        for name, route in old.items():
            if fresh.get(name) is not route:
                route.upstream.close()

    def _route(self, name: str, backend: Backend) -> Route:
        kept = self._routes.get(name)
        if kept is not None and kept.backend == backend:
            return kept
        return Route(backend, self._connect(backend))

    def close(self) -> None:
        """Close all idle connections."""
        for route in self._routes.values():
            route.upstream.close()
