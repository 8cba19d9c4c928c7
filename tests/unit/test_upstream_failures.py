"""Texts for foreign exceptions, and which of them mean that a host does not speak TLS."""

from __future__ import annotations

import errno

import pytest
from OpenSSL import SSL
from twisted.internet import defer, error
from twisted.internet.address import HostnameAddress
from twisted.python.failure import Failure
from twisted.web.client import RequestTransmissionFailed, ResponseFailed, ResponseNeverReceived

from ociregistry.upstream.failures import (
    CertificateRefused,
    broke_without_response,
    causes,
    explain,
    is_unreachable,
    lacks_descriptors,
    speaks_no_tls,
)


def wrapped(*inner: BaseException, kind: type[Exception] = ResponseNeverReceived) -> Exception:
    """Return the exception as an Agent wraps it."""
    return kind([Failure(one) for one in inner])


def tls(*reasons: str) -> SSL.Error:
    """Return the exception as pyOpenSSL raises it."""
    return SSL.Error([("SSL routines", "", reason) for reason in reasons])


SENTENCES = [
    (error.ConnectionRefusedError("111: refused"), "the connection was refused"),
    (error.DNSLookupError("no results for hostname lookup: x"), "host name cannot be resolved"),
    (error.NoRouteError(), "no route to host"),
    (error.TimeoutError(), "connection attempt timed out"),
    (error.TCPTimedOutError(), "connection attempt timed out"),
    (error.ConnectingCancelledError(HostnameAddress(b"reg.example", 443)), "connection attempt timed out"),
    (defer.TimeoutError(), "no response in time"),
    (defer.CancelledError(), "no response in time"),
    (error.ConnectError(errno.ENETDOWN, "down"), "no connection: Network is down"),
    (error.ConnectionDone(), "it closed the connection"),
    (error.ConnectionLost(), "the connection broke"),
    (tls("certificate verify failed"), "TLS failed: certificate verify failed"),
    (tls("unsupported protocol", "internal error"), "TLS failed: unsupported protocol; internal error"),
    (tls("tlsv1 alert internal error"), "TLS failed: tlsv1 alert internal error"),
    (tls("wrong version number"), "TLS failed: it does not speak TLS: wrong version number"),
    (SSL.Error(), "TLS failed: the connection broke"),
    (SSL.SysCallError(-1, "Unexpected EOF"), "TLS failed: the connection broke"),
    (
        CertificateRefused("CN=reg.example", "it has expired"),
        "TLS failed: the certificate of CN=reg.example is refused: it has expired",
    ),
    (RuntimeError("some other thing"), "some other thing"),
    (RuntimeError(), "RuntimeError"),
]


@pytest.mark.parametrize(("exception", "sentence"), SENTENCES)
def test_explain_exception(exception: Exception, sentence: str) -> None:
    assert explain(exception) == sentence


@pytest.mark.parametrize(("exception", "sentence"), SENTENCES[:-2])
@pytest.mark.parametrize("kind", [ResponseNeverReceived, ResponseFailed, RequestTransmissionFailed])
def test_explain_wrapped_exception(exception: Exception, sentence: str, kind: type[Exception]) -> None:
    assert explain(wrapped(exception, kind=kind)) == sentence
    assert explain(wrapped(wrapped(exception), kind=kind)) == sentence


@pytest.mark.parametrize(
    "what",
    [
        "bad certificate",
        "certificate expired",
        "certificate required",
        "certificate revoked",
        "certificate unknown",
        "unknown ca",
        "unsupported certificate",
    ],
)
def test_explain_refused_client_certificate(what: str) -> None:
    sentence = explain(wrapped(tls(f"tlsv1 alert {what}")))
    assert sentence == f"TLS failed: tlsv1 alert {what}: client certificate rejected or required"


def test_explain_none() -> None:
    assert explain(None)


def test_innermost_causes() -> None:
    one, two, three = ValueError(1), ValueError(2), ValueError(3)
    assert causes(one) == [one]
    assert causes(wrapped(one, wrapped(two, three))) == [one, two, three]
    empty = ResponseFailed([])
    assert causes(empty) == [empty]


@pytest.mark.parametrize(
    "exception",
    [
        error.ConnectionRefusedError(),
        tls("wrong version number"),
        tls("http request"),
        tls("packet length too long"),
        tls("record layer failure"),
    ],
)
def test_refused_connection_or_plain_text_means_no_tls(exception: Exception) -> None:
    assert speaks_no_tls(exception)
    assert speaks_no_tls(wrapped(exception))


@pytest.mark.parametrize(
    "exception",
    [
        tls("certificate verify failed"),
        tls("tlsv1 alert internal error"),
        tls("sslv3 alert handshake failure"),
        tls("unsupported protocol"),
        SSL.Error(),
        SSL.SysCallError(-1, "Unexpected EOF"),
        # Regardless of the text from the host.
        CertificateRefused("CN=wrong version number", "http request"),
        error.TimeoutError(),
        error.TCPTimedOutError(),
        error.DNSLookupError(),
        error.NoRouteError(),
        error.ConnectionLost(),
        error.ConnectionDone(),
        defer.CancelledError(),
        ValueError("wrong version number"),
    ],
)
def test_failed_verification_or_timeout_does_not_mean_no_tls(exception: Exception) -> None:
    assert not speaks_no_tls(exception)
    assert not speaks_no_tls(wrapped(exception))


@pytest.mark.parametrize(
    "exception", [error.ConnectionDone(), error.ConnectionLost(), SSL.Error(), SSL.SysCallError(104, "ECONNRESET")]
)
@pytest.mark.parametrize("kind", [ResponseNeverReceived, ResponseFailed, RequestTransmissionFailed])
def test_lost_connection_means_broke_without_response(exception: Exception, kind: type[Exception]) -> None:
    assert broke_without_response(wrapped(exception, kind=kind))
    assert not broke_without_response(wrapped(exception, defer.CancelledError(), kind=kind))


@pytest.mark.parametrize(
    "exception",
    [
        error.ConnectionAborted(),
        error.ConnectionRefusedError(),
        error.ConnectError(),
        error.TimeoutError(),
        error.DNSLookupError(),
        defer.CancelledError(),
        CertificateRefused("CN=reg.example", "it has expired"),
        tls("tlsv1 alert internal error"),
        ValueError("no HTTP"),
    ],
)
def test_other_failures_do_not_mean_broke_without_response(exception: Exception) -> None:
    assert not broke_without_response(exception)
    assert not broke_without_response(wrapped(exception))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_lack_of_descriptors_says_nothing_about_the_host(number: int) -> None:
    """Twisted tells of it by the error of a connection."""
    failed = error.ConnectBindError(number, "Too many open files")
    assert explain(failed) == "this server has no file descriptor left for a connection"
    assert lacks_descriptors(failed)
    assert not is_unreachable(failed)
    assert is_unreachable(error.ConnectBindError(errno.EADDRNOTAVAIL, "Cannot assign requested address"))
