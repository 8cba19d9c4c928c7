"""A certificate authority for tests."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
_LIFE = timedelta(days=365 * 100)
_SHORT_LIFE = timedelta(days=365)


class Authority:
    """Issues certificates as PEM files in a folder; `ca` is the file with its own.

    A root, or certified by the authority `above`: then the file of each certificate that it issues also contains its
    own certificate.
    """

    def __init__(self, folder: Path, name: str = "test authority", above: Authority | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.ca = folder / f"{name.replace(' ', '-')}.crt"
        usage = x509.KeyUsage(
            key_cert_sign=True,
            crl_sign=True,
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        issuer = above or self
        builder = issuer._builder(self._name, self._key, ca=True).add_extension(usage, critical=True)
        _write(self.ca, builder.sign(issuer._key, hashes.SHA256()))
        self._chain: bytes = self.ca.read_bytes() + above._chain if above else b""

    def issue(self, *names: str, expired: bool = False) -> tuple[Path, Path]:
        """Issue a certificate for DNS names and IP addresses, for servers and clients, with its key.

        The first of the names is the subject, and the name of the files.
        """
        return self._issue(names, ec.generate_private_key(ec.SECP256R1()), _SHORT_LIFE if expired else _LIFE)

    @classmethod
    def self_signed(cls, folder: Path, *names: str) -> tuple[Path, Path]:
        """Make a self-signed certificate for these names, with its key."""
        own = cls(folder, names[0])
        return own._issue(names, own._key, _LIFE)

    def _issue(self, names: Sequence[str], key: ec.EllipticCurvePrivateKey, life: timedelta) -> tuple[Path, Path]:
        subject = x509.SubjectAlternativeName([_general_name(name) for name in names])
        builder = self._builder(_name(names[0]), key, ca=False, life=life)
        builder = builder.add_extension(subject, critical=False)
        certificate_path = self._folder / f"{names[0]}.crt"
        key_path = certificate_path.with_suffix(".key")
        _write(certificate_path, builder.sign(self._key, hashes.SHA256()), self._chain)
        form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
        return certificate_path, key_path

    def server_context(self, *names: str, demand_client: bool = False) -> ssl.SSLContext:
        """Make the TLS context of a server with these names; it may demand client certificates of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(*names))
        if demand_client:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """Make the TLS context of a client that trusts this authority alone."""
        return ssl.create_default_context(cafile=str(self.ca))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool, life: timedelta = _LIFE
    ) -> x509.CertificateBuilder:
        public = key.public_key()
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_BEGIN)
            .not_valid_after(_BEGIN + life)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(issuer, critical=False)
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, certificate: x509.Certificate, chain: bytes = b"") -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + chain)
