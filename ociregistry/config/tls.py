"""The `tls` sections: certificates and keys are read and checked with the configuration, not at the first pull.

OpenSSL is imported where there are any: that takes a fifth of the start of a command.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ociregistry.config.nodes import Node

if TYPE_CHECKING:
    from OpenSSL import crypto

    from ociregistry.openssl import Certificates, KeyPair

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """TLS settings of one upstream."""

    ca: Certificates | None = None
    """Certificate authorities to trust instead of the operating system's for the upstream's own host, and beside them
    for other hosts that its requests lead to."""
    client: KeyPair | None = None
    """Client certificate to present; None for none."""
    verify: bool = True
    """Whether to verify the upstream's certificate."""


SYSTEM_TRUST = UpstreamTls()
"""The default: the operating system's trust store, and no client certificate."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """TLS settings towards clients."""

    identity: KeyPair
    """The server's certificate."""
    client_ca: Certificates | None = None
    """Authorities that must have signed the clients' certificates; None to require no client certificate."""


def read_upstream_tls(node: Node) -> tuple[UpstreamTls, tuple[str, ...]]:
    """Read the section `tls` of an upstream.

    Returns:
        The settings, and warnings about settings that are probably a mistake.

    Raises:
        ConfigInvalid: a key is unknown, a file cannot be read, or a certificate or key in it cannot be used.
    """
    nodes = node.mapping("ca", "cert", "key", "insecure_skip_verify", below="tls.")
    verify = not ("insecure_skip_verify" in nodes and nodes["insecure_skip_verify"].flag())
    ca = _certificates(nodes["ca"]) if "ca" in nodes else None
    warnings: tuple[str, ...] = ()
    if ca is not None and not verify:
        warnings = (f"{nodes['ca'].where}: has no effect with insecure_skip_verify: true",)
    client = _key_pair(node, nodes) if "cert" in nodes or "key" in nodes else None
    return UpstreamTls(ca, client, verify), warnings


def read_server_tls(node: Node) -> ServerTls:
    """Read the section `tls` of the daemon.

    Raises:
        ConfigInvalid: a key is missing or unknown, a file cannot be read, or a certificate or key in it cannot be
            used.
    """
    nodes = node.mapping("cert", "key", "client_ca", below="tls.")
    return ServerTls(
        _key_pair(node, nodes),
        _certificates(nodes["client_ca"]) if "client_ca" in nodes else None,
    )


def _key_pair(node: Node, nodes: Mapping[str, Node]) -> KeyPair:
    from OpenSSL import SSL, crypto

    from ociregistry.openssl import KeyPair, openssl_context, openssl_reason

    for name in ("cert", "key"):
        if name not in nodes:
            raise node.missing(f"tls.{name}", "a certificate and its key go together")
    certificates = _certificates(nodes["cert"])
    pem = nodes["key"].contents()
    path = nodes["key"].path()
    if b"ENCRYPTED" in pem:
        # For an encrypted key, OpenSSL asks for the passphrase on the terminal.
        raise nodes["key"].error(f"{path} is encrypted: no passphrase can be entered, decrypt it first")
    try:
        key = crypto.load_privatekey(crypto.FILETYPE_PEM, pem)
    except (crypto.Error, ValueError, TypeError):
        raise nodes["key"].error(f"{path} holds no private key in PEM form") from None
    pair = KeyPair(certificates, pem)
    if _public(pair.certificate.get_pubkey()) != _public(key):
        raise nodes["key"].error(f"{path} is not the key of the certificate in {certificates.path}")
    try:
        openssl_context(pair)
    except SSL.Error as error:
        raise nodes["cert"].error(
            f"{certificates.path} cannot be used: {openssl_reason(error, 'OpenSSL refuses it')}"
        ) from None
    return pair


def _public(key: crypto.PKey) -> bytes:
    from OpenSSL import crypto

    return crypto.dump_publickey(crypto.FILETYPE_PEM, key)


def _certificates(node: Node) -> Certificates:
    from OpenSSL import crypto

    from ociregistry.openssl import Certificates

    path = node.path()
    pems = tuple(_CERTIFICATE.findall(node.contents()))
    if not pems:
        raise node.error(f"{path} holds no certificate in PEM form")
    for number, pem in enumerate(pems, start=1):
        try:
            crypto.load_certificate(crypto.FILETYPE_PEM, pem)
        except (crypto.Error, ValueError):
            raise node.error(f"{path}: certificate {number} in it is damaged") from None
    return Certificates(path, pems)
