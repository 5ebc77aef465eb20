"""Which backend serves a model: a snapshot of the configuration, and the connections to each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
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
        self._by_any_name: dict[str, Route] = {}

    def find(self, model: str, allowed: Collection[str] | None = None) -> Route:
        """The route of the model that a client named, by its name or an alias.

        `allowed`: what the client may ask for; who may have a model may have it by its aliases too.
        Raises ModelNotFound.
        """
        route = self._by_any_name.get(model)
        if route is None or not _may_have(model, route.backend, allowed):
            raise ModelNotFound("The model does not exist or you can't use it.", param="model")
        return route

    def listed(self, allowed: Collection[str] | None = None) -> Iterable[tuple[str, Backend]]:
        """All names and aliases that a client may ask for, with their backends."""
        found = self._by_any_name.items()
        return [(name, r.backend) for name, r in found if _may_have(name, r.backend, allowed)]

    def all(self) -> Iterable[Backend]:
        """The backends in force, in the order of the configuration."""
        return [route.backend for route in self._routes.values()]

    def swap(self, backends: Mapping[str, Backend]) -> None:
        """Put a new configuration in force; connections to unchanged backends are kept.

        What `connect` raises comes through, and nothing has changed then.
        """
        fresh = {name: self._route(name, backend) for name, backend in backends.items()}
        old, self._routes = self._routes, fresh
        self._by_any_name = {
            name: route
            for route in fresh.values()
            for name in (route.backend.name, *route.backend.aliases)
        }
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


def _may_have(name: str, backend: Backend, allowed: Collection[str] | None) -> bool:
    return allowed is None or name in allowed or backend.name in allowed
