"""Explains and classifies the exceptions of Twisted, OpenSSL and the resolver."""

from __future__ import annotations

import os

from OpenSSL import SSL
from twisted.internet import defer, error

from ociregistry.config.proxy import Proxy
from ociregistry.errors import is_out_of_descriptors
from ociregistry.openssl import openssl_reason


class CertificateRefused(SSL.Error):
    """A host's certificate was refused. It is an SSL.Error, so that raising it ends the handshake."""

    def __init__(self, subject: str, why: str) -> None:
        self.message = f"the certificate of {subject} is refused: {why}"
        # The form of OpenSSL's error queue, which Twisted reads.
        super().__init__([("certificate", "", self.message)])


class ProxyFailed(Exception):
    """A proxy refuses what it is asked for, or is no HTTP proxy; the text names the proxy, and says why."""

    def __init__(self, proxy: Proxy, why: str) -> None:
        super().__init__(f"proxy {proxy}: {why}")
        self.why = why


class ProxyUnreachable(ProxyFailed):
    """No connection to a proxy can be made."""


class TunnelFailed(ProxyFailed):
    """A proxy cannot reach the host."""


_EXPLANATIONS: tuple[tuple[type[BaseException], str], ...] = (
    (error.ConnectionRefusedError, "the connection was refused"),
    (error.DNSLookupError, "host name cannot be resolved"),
    (UnicodeError, "host name cannot be resolved"),
    (error.NoRouteError, "no route to host"),
    (error.TimeoutError, "connection attempt timed out"),
    (error.TCPTimedOutError, "connection attempt timed out"),
    (error.ConnectingCancelledError, "connection attempt timed out"),
    (defer.TimeoutError, "no response in time"),
    # An Agent raises this when a deadline cancelled the request.
    (defer.CancelledError, "no response in time"),
    (error.ConnectionDone, "it closed the connection"),
    (error.ConnectionLost, "the connection broke"),
)


_BROKEN = openssl_reason(None)
"""The reason where a connection broke during TLS, about which OpenSSL has nothing to say."""
_NO_TLS = "it does not speak TLS: "
_CLIENT_CERTIFICATE_ALERTS = (
    "alert bad certificate",
    "alert certificate expired",
    "alert certificate required",
    "alert certificate revoked",
    "alert certificate unknown",
    "alert unknown ca",
    "alert unsupported certificate",
)


def causes(exception: BaseException) -> list[BaseException]:
    """Return the exceptions that caused `exception`, which an Agent may have wrapped several times."""
    reasons = getattr(exception, "reasons", None)
    if not reasons:
        return [exception]
    return [cause for reason in reasons for cause in causes(reason.value)]


def explain(exception: BaseException | None) -> str:
    """Return the reason why a request failed, as text for an operator."""
    found = causes(exception) if exception else []
    for cause in found:
        if is_out_of_descriptors(cause):
            return "this server has no file descriptor left for a connection"
        if isinstance(cause, SSL.Error):
            return f"TLS failed: {_NO_TLS if speaks_no_tls(cause) else ''}{_tls_reason(cause)}"
        for kind, sentence in _EXPLANATIONS:
            if isinstance(cause, kind):
                return sentence
        if isinstance(cause, error.ConnectError) and cause.osError:
            return f"no connection: {os.strerror(cause.osError)}"
        if _is_of_http_client(cause):
            return "its response is not valid HTTP"
    first = found[0] if found else exception
    return str(first) or type(first).__name__


def _is_of_http_client(cause: BaseException) -> bool:
    """Return whether Twisted's HTTP client raised `cause` when it parsed a response, mostly by private types."""
    return isinstance(cause, ValueError | LookupError) or type(cause).__module__.startswith("twisted.web.")


def _tls_reason(cause: SSL.Error) -> str:
    told = openssl_reason(cause)
    # The other side sends an alert, so these are about the certificate of this client.
    refused = any(alert in told for alert in _CLIENT_CERTIFICATE_ALERTS)
    return f"{told}: client certificate rejected or required" if refused else told


def was_cancelled(exception: BaseException) -> bool:
    """Return whether the request failed because it was cancelled, by its caller or by a deadline."""
    cancelled = (defer.CancelledError, error.ConnectingCancelledError)
    return any(isinstance(cause, cancelled) for cause in causes(exception))


def lacks_descriptors(exception: BaseException | None) -> bool:
    """Return whether the request failed because this process could not open another socket."""
    return exception is not None and any(map(is_out_of_descriptors, causes(exception)))


def is_unreachable(exception: BaseException) -> bool:
    """Return whether the host could not be reached.

    That is so where the name look-up or the connection failed or took too long, here or at a proxy, where the
    connection broke during the TLS handshake, and where the request was cancelled. A lack of file descriptors here
    says nothing about the host.
    """
    timeouts = (error.TimeoutError, defer.TimeoutError, error.TCPTimedOutError)
    if lacks_descriptors(exception):
        return False
    kinds = (error.ConnectError, error.DNSLookupError, TunnelFailed, *timeouts)
    return was_cancelled(exception) or any(
        isinstance(cause, kinds) or (isinstance(cause, SSL.Error) and _tls_reason(cause) == _BROKEN)
        for cause in causes(exception)
    )


def broke_without_response(exception: BaseException) -> bool:
    """Return whether the other side closed or reset the connection before the headers of the response.

    A time-out, a refused connection, a refused certificate and a malformed response do not count.
    """
    return all(
        (
            isinstance(cause, error.ConnectionDone | error.ConnectionLost)
            and not isinstance(cause, error.ConnectionAborted)
        )
        or (isinstance(cause, SSL.Error) and _tls_reason(cause) == _BROKEN)
        for cause in causes(exception)
    )


def speaks_no_tls(exception: BaseException) -> bool:
    """Return whether the host refused the connection, or answered the TLS hello in plain text.

    A time-out or a refused certificate does not count.
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
        or (
            isinstance(cause, SSL.Error)
            # Its text contains the certificate's subject, in which a host may write anything.
            and not isinstance(cause, CertificateRefused)
            and any(hint in _tls_reason(cause) for hint in plain)
        )
        for cause in causes(exception)
    )
