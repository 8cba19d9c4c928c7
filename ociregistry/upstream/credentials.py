"""The credentials for one upstream: from the configuration, or from one of the credential helpers of Docker's client.

`docker-credential-NAME get` reads the registry's name from its stdin and writes a JSON object with `Username` and
`Secret` to its stdout. When it fails, it writes the reason and exits with a status other than 0.
"""

from __future__ import annotations

import base64
import errno
import os
import shutil
from collections.abc import Callable, Coroutine
from typing import Any, cast

from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.interfaces import IProcessTransport, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from ociregistry.concurrency import SingleFlight
from ociregistry.config.registries import Helper, IdentityToken, Login, Password
from ociregistry.errors import Unavailable
from ociregistry.names import DOCKER_HUB, Upstream
from ociregistry.strictjson import parse_json

_TIMEOUT = 30.0
"""Seconds for a helper to end."""
_MOST_BYTES = 64 * 1024
"""Bytes of a helper's output; a helper that writes more is killed."""
_DOCKER_HUB_SERVER = "https://index.docker.io/v1/"
"""The name under which Docker's client, and so the helpers, store the credentials of Docker Hub."""
_TOKEN_USERNAME = "<token>"
"""The `Username` that marks the `Secret` as an identity token."""


async def ask_helper(helper: Helper, upstream: Upstream, reactor: Any) -> Password | IdentityToken:
    """Run a credential helper and return its credentials for `upstream`.

    Raises:
        Unavailable: the helper cannot be run, takes too long, or gives no usable credentials.
    """
    server = _DOCKER_HUB_SERVER if upstream.name == DOCKER_HUB else upstream.name
    protocol = _HelperProtocol(server.encode("ascii"))
    what = f"{upstream}: {helper.program}"
    if shutil.which(helper.program) is None:
        # Where spawnProcess forks first, only the child would notice a missing program.
        raise Unavailable(f"{what} cannot be run: {os.strerror(errno.ENOENT)}")
    try:
        reactor.spawnProcess(protocol, helper.program, [helper.program, "get"], env=os.environ)
        output, done = await protocol.ended.addTimeout(_TIMEOUT, reactor)
    except defer.TimeoutError:
        raise Unavailable(f"{what} gave no answer within {_TIMEOUT:g} s") from None
    except OSError as error:
        raise Unavailable(f"{what} cannot be run: {error.strerror}") from None
    if not done:
        # The output of a failed helper is its reason, unless it failed while it wrote the secret.
        told = "" if b'"Secret"' in output else output[:200].decode("utf-8", "replace").strip()
        raise Unavailable(f"{what} has no credentials: {told!r}")
    try:
        document = parse_json(output)
        user, secret = document["Username"], document["Secret"]
        sound = all(isinstance(text, str) and text and text.isprintable() for text in (user, secret))
        if not sound or ":" in user:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise Unavailable(f"{what} returned no usable Username and Secret") from None
    return IdentityToken(secret) if user == _TOKEN_USERNAME else Password(user, secret)


class _HelperProtocol(ProcessProtocol):
    def __init__(self, server: bytes) -> None:
        self._server = server
        self._output = bytearray()
        self.ended: Deferred[tuple[bytes, bool]] = Deferred(self._cancel)
        """Fires with the helper's output, and whether it exited with status 0."""

    def connectionMade(self) -> None:
        self._process.write(self._server)
        self._process.closeStdin()

    def outReceived(self, data: bytes) -> None:
        self._output += data
        if len(self._output) > _MOST_BYTES:
            self._kill()

    def processEnded(self, reason: Failure) -> None:
        if not self.ended.called:
            self.ended.callback((bytes(self._output), reason.check(ProcessDone) is not None))

    @property
    def _process(self) -> IProcessTransport:
        return cast(IProcessTransport, self.transport)

    def _cancel(self, ended: Deferred[tuple[bytes, bool]]) -> None:
        self._kill()
        ended.errback(CancelledError())

    def _kill(self) -> None:
        try:
            self._process.signalProcess("KILL")
        except ProcessExitedAlready:
            return


_HELPER_TTL = 300.0
"""Seconds for which a helper's answer is cached: it may ask a cloud, whose passwords last for hours."""

AskHelper = Callable[[Helper], Coroutine[Deferred[Any], Any, Password | IdentityToken]]
"""Asks a helper; raises `Unavailable` when it gives no credentials."""


class Credentials:
    """The configured credentials of one upstream, or those of its configured helper."""

    def __init__(self, login: Login | None, ask: AskHelper, clock: IReactorTime) -> None:
        self._login = login
        self._ask = ask
        self._clock = clock
        self._cached: tuple[Password | IdentityToken, float] | None = None
        self._single_flight: SingleFlight[None, Password | IdentityToken] = SingleFlight()

    @property
    def configured(self) -> bool:
        """Whether credentials or a helper are configured."""
        return self._login is not None

    @property
    def from_helper(self) -> bool:
        """Whether `get` returns cached credentials of a helper, which may give new ones after a refusal."""
        return self._cached is not None and self._clock.seconds() < self._cached[1]

    async def get(self) -> Password | IdentityToken | None:
        """Return the credentials, or None for anonymous access.

        Raises:
            Unavailable: the helper gives none.
        """
        helper = self._login
        if not isinstance(helper, Helper):
            return helper
        if self._cached is not None and self.from_helper:
            return self._cached[0]
        told = await self._single_flight.join(None, lambda: self._ask(helper))
        self._cached = told, self._clock.seconds() + _HELPER_TTL
        return told

    def forget(self) -> None:
        """Drop cached credentials after they were refused, so that the helper is asked again."""
        self._cached = None


def spell_login(credentials: Password | IdentityToken | None) -> str:
    """Return whose the credentials are, for messages; empty for none."""
    if isinstance(credentials, Password):
        return f"the user {credentials.user}"
    return "the identity token" if credentials is not None else ""


def basic(password: Password) -> str:
    """Return the `Authorization` header for a user and a password (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{password.user}:{password.password}".encode()).decode("ascii")
