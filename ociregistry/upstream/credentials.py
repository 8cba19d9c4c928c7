"""Who we are to one upstream."""

from __future__ import annotations

import base64
from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from ociregistry.config.registries import Helper, IdentityToken, Login, Password
from ociregistry.flights import Flights

_HELPER_KEPT = 300.0
"""Seconds for which a helper is not asked again: it may ask a cloud, which gives passwords that last for hours."""

Ask = Callable[[Helper], Coroutine[Deferred[Any], Any, Password | IdentityToken]]
"""Asks a helper; raises `Unavailable`."""


class Credentials:
    """What the operator configured, or what the configured helper says."""

    def __init__(self, login: Login | None, ask: Ask, clock: IReactorTime) -> None:
        self._login = login
        self._ask = ask
        self._clock = clock
        self._kept: tuple[Password | IdentityToken, float] | None = None
        self._flights: Flights[None, Password | IdentityToken] = Flights()

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return self._login is not None

    @property
    def from_helper(self) -> bool:
        """Whether a helper gave them earlier, so that after a refusal it may give new ones."""
        return self._kept is not None and self._clock.seconds() < self._kept[1]

    async def get(self) -> Password | IdentityToken | None:
        """The credentials, None for anonymous access; raises `Unavailable`."""
        helper = self._login
        if not isinstance(helper, Helper):
            return helper
        if self._kept is not None and self.from_helper:
            return self._kept[0]
        told = await self._flights.join(None, lambda: self._ask(helper))
        self._kept = told, self._clock.seconds() + _HELPER_KEPT
        return told

    def forget(self) -> None:
        """To be called when they were refused."""
        self._kept = None


def basic(password: Password) -> str:
    """The `Authorization` header for a user and a password (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{password.user}:{password.password}".encode()).decode("ascii")
