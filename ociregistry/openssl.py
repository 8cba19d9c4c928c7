"""OpenSSL: certificates with their keys, the contexts that are made from them, and its errors as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from OpenSSL import SSL, crypto
from twisted.internet.ssl import Certificate, CertificateOptions, platformTrust, trustRootFromCertificates


@dataclass(frozen=True, slots=True)
class Certificates:
    """One or more certificates, each as PEM, and the file that they were read from."""

    path: Path
    pems: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate with its chain and its private key.

    `certificates` begins with the certificate, followed by its intermediates; `key` is PEM.
    """

    certificates: Certificates
    key: bytes = field(repr=False)

    @property
    def certificate(self) -> crypto.X509:
        """The certificate, parsed."""
        return _loaded(self.certificates.pems[0])


def openssl_context(
    identity: KeyPair | None, ca: Certificates | None = None, *, system_trust: bool = False
) -> SSL.Context:
    """Make an OpenSSL context for connections of a client or a server.

    `identity` is the certificate to present, None for none. The peer's certificate is verified with `ca`, with the
    operating system's trust store if `system_trust`, or with both; if neither is given, it is not verified.

    Raises:
        SSL.Error: OpenSSL refuses the certificate or the key.
    """
    key, certificate, rest = None, None, None
    if identity is not None:
        key = crypto.load_privatekey(crypto.FILETYPE_PEM, identity.key)
        certificate, *rest = map(_loaded, identity.certificates.pems)
    trusted = trustRootFromCertificates(list(map(Certificate.loadPEM, ca.pems))) if ca else None
    context = CertificateOptions(
        privateKey=key,
        certificate=certificate,
        extraCertChain=rest,
        trustRoot=platformTrust() if system_trust else trusted,
    ).getContext()
    if ca is not None and (store := context.get_cert_store()) is not None:
        if system_trust:
            for pem in ca.pems:
                store.add_cert(_loaded(pem))
        # A certificate that the operator trusts need not be self-signed: it may be an intermediate or the peer's own.
        store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    return context


def _loaded(pem: bytes) -> crypto.X509:
    return crypto.load_certificate(crypto.FILETYPE_PEM, pem)


def openssl_reason(error: BaseException | None, otherwise: str = "the connection broke") -> str:
    """Return the text of OpenSSL's error queue in `error`, or `otherwise` if it is empty."""
    queue = error.args[0] if error and error.args and isinstance(error.args[0], list) else []
    return "; ".join(str(entry[-1]) for entry in queue) or otherwise
