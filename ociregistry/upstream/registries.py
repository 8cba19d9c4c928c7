"""The upstreams that there are: which are allowed, and the Registry for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from fnmatch import fnmatchcase

from ociregistry.chain import NOBODY, Chain
from ociregistry.errors import Denied
from ociregistry.names import Upstream
from ociregistry.upstream.registry import Registry

_MOST_KEPT = 500


class Registries:
    """Makes a Registry for each upstream that is asked for, and keeps those used last."""

    def __init__(self, allowed: tuple[str, ...], make: Callable[[Upstream], Registry]) -> None:
        """`allowed` are globs; with none, every upstream is allowed."""
        self._allowed = allowed
        self._make = make
        self._kept: OrderedDict[Upstream, Registry] = OrderedDict()

    def check(self, upstream: Upstream) -> None:
        """Raises `Denied` when the operator does not allow `upstream`."""
        check_allowed(upstream, self._allowed)

    def use(self, allowed: tuple[str, ...]) -> None:
        """From now on these are allowed, and all registries are made anew."""
        self._allowed = allowed
        self._kept.clear()

    def get(self, upstream: Upstream, chain: Chain = NOBODY) -> Registry:
        """The Registry for `upstream`, to be asked for who stands in `chain`; raises `Denied`."""
        self.check(upstream)
        registry = self._kept.pop(upstream, None) or self._make(upstream)
        self._kept[upstream] = registry
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return registry.asked_through(chain) if chain != NOBODY else registry


def check_allowed(upstream: Upstream, allowed: tuple[str, ...]) -> None:
    """Raises `Denied` when `is_allowed` does not hold."""
    if not is_allowed(upstream, allowed):
        raise Denied(f"{upstream}: the operator does not allow this upstream (--allow-upstreams)")


def is_allowed(upstream: Upstream, allowed: tuple[str, ...]) -> bool:
    """Whether one of the globs is for `upstream`; without any, all are allowed."""
    return not allowed or upstream.name in allowed or any(fnmatchcase(upstream.name, glob) for glob in allowed)
