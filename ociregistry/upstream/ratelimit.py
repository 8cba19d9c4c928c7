"""The remaining rate limit of a registry, as its responses tell it; a 429 itself is handled in `client`."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime

from ociregistry.upstream.http import Response

_LOW_COUNT = 25
"""Remaining requests at which an unknown limit is low; a known one is low at a quarter of it."""
_SHORTEST, _LONGEST = 60.0, 3600.0
"""Bounds of the wait in seconds."""
_DEFAULT_PERIOD = 900.0
"""Seconds to wait where the headers tell neither the window nor the reset."""
_MOST_DIGITS = 12


class RateLimit:
    """Tells when requests of the lowest priority must wait, so that the rest of the limit is left to clients.

    Reads `RateLimit-Limit` and `RateLimit-Remaining`, which are plain numbers or, at Docker Hub, `100;w=21600` with
    the window in seconds, and `RateLimit-Reset`, the seconds until the limit is available in full again
    (draft-ietf-httpapi-ratelimit-headers).
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._low_until = 0.0
        self._period: float | None = None
        """Seconds for which requests wait while the limit is low; None while it is not."""

    def update(self, response: Response) -> None:
        """Take in the rate limit headers of `response`; missing or malformed ones change nothing."""
        remaining, window = _parse(response.header("ratelimit-remaining"))
        if remaining is None:
            return
        limit, limit_window = _parse(response.header("ratelimit-limit"))
        if remaining > (_LOW_COUNT if limit is None else limit / 4):
            self._period = None
            return
        self._period = _DEFAULT_PERIOD
        reset, _ = _parse(response.header("ratelimit-reset"))
        window = limit_window if window is None else window
        if reset is not None:
            self._period = float(reset)
        elif window is not None:
            self._period = window / 4
        self._period = min(max(_SHORTEST, self._period), _LONGEST)
        self._low_until = self._clock.seconds() + self._period

    def delay(self) -> float:
        """Return the seconds for which a request of the lowest priority must wait; 0 to send it now.

        When the wait for a low limit is over, one request may be sent, and the headers of its response decide again.
        Where it has none, the next request may be sent after another wait of the same length.
        """
        if self._period is None:
            return 0.0
        now = self._clock.seconds()
        if now < self._low_until:
            return self._low_until - now
        self._low_until = now + self._period
        return 0.0


def _parse(value: str) -> tuple[int | None, int | None]:
    """Return the number at the start of a header and its parameter `w`, each None where missing or malformed."""
    number, *rest = value.partition(",")[0].split(";")
    parameters = dict(parameter.strip().partition("=")[::2] for parameter in rest)
    return _number(number), _number(parameters.get("w", ""))


def _number(text: str) -> int | None:
    digits = text.strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS else None
