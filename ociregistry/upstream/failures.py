"""Where foreign exceptions end: what Twisted, OpenSSL and the resolver raise becomes a sentence."""

from __future__ import annotations

from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet import defer, error

_SENTENCES: tuple[tuple[type[BaseException], str], ...] = (
    (error.ConnectionRefusedError, "the connection was refused"),
    (error.DNSLookupError, "its host name cannot be resolved"),
    (UnicodeError, "its host name cannot be resolved"),
    (error.NoRouteError, "there is no route to it"),
    (error.TimeoutError, "it cannot be connected to in time"),
    (error.TCPTimedOutError, "it cannot be connected to in time"),
    (error.ConnectingCancelledError, "it cannot be connected to in time"),
    (defer.TimeoutError, "it gave no answer in time"),
    # How an Agent tells that a request was cancelled by its time-out.
    (defer.CancelledError, "it gave no answer in time"),
    (error.ConnectionDone, "it closed the connection"),
    (error.ConnectionLost, "the connection broke"),
)


def causes(exception: BaseException) -> list[BaseException]:
    """The exceptions at the bottom of what an Agent raises."""
    reasons = getattr(exception, "reasons", None)
    if not reasons:
        return [exception]
    return [cause for reason in reasons for cause in causes(reason.value)]


def explain(exception: BaseException | None) -> str:
    """Why a request failed, in words for an operator."""
    for cause in causes(exception) if exception else ():
        if isinstance(cause, SSL.Error):
            return f"TLS failed: {_tls_reason(cause)}"
        if isinstance(cause, VerificationError):
            return "TLS failed: the certificate is for another host name"
        for kind, sentence in _SENTENCES:
            if isinstance(cause, kind):
                return sentence
    return str(exception) or type(exception).__name__


def _tls_reason(cause: SSL.Error) -> str:
    reasons = cause.args[0] if cause.args and isinstance(cause.args[0], list) else []
    return "; ".join(str(entry[-1]) for entry in reasons) or "the connection broke"


def was_cancelled(exception: BaseException) -> bool:
    """Whether the request failed because somebody cancelled it."""
    cancelled = (defer.CancelledError, error.ConnectingCancelledError)
    return any(isinstance(cause, cancelled) for cause in causes(exception))


def speaks_no_tls(exception: BaseException) -> bool:
    """Whether the host refused the connection, or answered the TLS hello in plain text.

    A time-out or a failed verification says no such thing.
    """
    plain = (
        "wrong version number",
        "http request",
        "unknown protocol",
        "packet length too long",
        "record layer",
    )
    return any(
        isinstance(cause, error.ConnectionRefusedError)
        or (isinstance(cause, SSL.Error) and any(hint in _tls_reason(cause) for hint in plain))
        for cause in causes(exception)
    )
