"""`tls` of an upstream and of the daemon: certificates and keys are checked when the file is read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from OpenSSL import crypto

from ociregistry.config.tls import SYSTEM_TRUST, ServerTls, UpstreamTls
from ociregistry.names import Upstream
from ociregistry.openssl import Certificates, KeyPair
from tests.certificates import Authority
from tests.unit.support.config_files import read, refusal

REG = Upstream("reg.example")
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
PKCS8, TRADITIONAL = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL
PLAIN, ENCRYPTED = serialization.NoEncryption(), serialization.BestAvailableEncryption(b"passphrase")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "ociregistry.yaml"


@pytest.fixture
def pair(authority: Authority) -> tuple[Path, Path]:
    """Return the certificate client.crt and its key client.key, beside the configuration file."""
    return authority.issue("client")


def upstream_tls(path: Path, text: str) -> UpstreamTls:
    """Return the TLS settings for `REG` made from this `tls` on line 2; there must be no warnings."""
    config = read(path, f"- name: {REG}\n  tls: {{{text}}}\n")
    assert config.warnings == ()
    return config.registries[REG].tls


def server_tls(path: Path, text: str) -> ServerTls:
    """Return the TLS settings for clients made from this `tls`."""
    tls = read(path, f"tls: {{{text}}}\n").tls
    assert tls is not None
    return tls


def subjects(pair: KeyPair) -> list[str]:
    """Return the subjects of the certificate chain; the key must belong to the first."""
    key = crypto.load_privatekey(crypto.FILETYPE_PEM, pair.key)
    assert len({crypto.dump_publickey(crypto.FILETYPE_PEM, one) for one in (key, pair.certificate.get_pubkey())}) == 1
    all_of_them = [crypto.load_certificate(crypto.FILETYPE_PEM, pem) for pem in pair.certificates.pems]
    return [certificate.to_cryptography().subject.rfc4514_string() for certificate in all_of_them]


@pytest.mark.parametrize("text", ["", "insecure_skip_verify: false", "insecure_skip_verify: False", "ca: ~, cert:"])
def test_empty_tls_means_system_trust(path: Path, text: str) -> None:
    assert upstream_tls(path, text) == SYSTEM_TRUST == UpstreamTls(None, None, verify=True)


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_verification_can_be_switched_off(path: Path, text: str) -> None:
    assert upstream_tls(path, f"insecure_skip_verify: {text}") == UpstreamTls(verify=False)


def test_ca_file_with_several_certificates(path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Authority(path.parent, "another authority")
    bundle = path.parent / "bundle.pem"
    bundle.write_bytes(b"# one\n" + authority.ca.read_bytes() + b"# two\n\n" + other.ca.read_bytes() + b"# end\n")
    monkeypatch.chdir("/")
    for where in ("bundle.pem", bundle):
        ca = upstream_tls(path, f"ca: {where}").ca
        assert ca is not None
        assert ca.path == bundle
        assert [pem.strip() for pem in ca.pems] == [one.ca.read_bytes().strip() for one in (authority, other)]


def test_certificate_and_key(path: Path, authority: Authority, pair: tuple[Path, Path]) -> None:
    certificate, key = pair
    client = KeyPair(Certificates(certificate, (certificate.read_bytes(),)), key.read_bytes())
    ca = Certificates(authority.ca, (authority.ca.read_bytes(),))
    assert upstream_tls(path, "cert: client.crt, key: client.key") == UpstreamTls(None, client)
    assert upstream_tls(path, f"ca: {authority.ca.name}, cert: {certificate}, key: {key}") == UpstreamTls(ca, client)
    assert server_tls(path, "cert: client.crt, key: client.key") == ServerTls(client, None)
    assert server_tls(path, f"key: client.key, client_ca: {authority.ca.name}, cert: client.crt") == ServerTls(
        client, ca
    )
    assert subjects(client) == ["CN=client"]


def test_certificate_with_intermediates(path: Path, authority: Authority) -> None:
    Authority(path.parent, "intermediate", authority).issue("client")
    client = upstream_tls(path, "cert: client.crt, key: client.key").client
    assert client is not None
    assert subjects(client) == ["CN=client", "CN=intermediate"]


def test_certificate_and_key_in_one_file(path: Path, pair: tuple[Path, Path]) -> None:
    (path.parent / "both.pem").write_bytes(pair[1].read_bytes() + pair[0].read_bytes())
    assert subjects(server_tls(path, "cert: both.pem, key: both.pem").identity) == ["CN=client"]


@pytest.mark.parametrize("form", [PKCS8, TRADITIONAL])
def test_every_key_format(path: Path, pair: tuple[Path, Path], form: serialization.PrivateFormat) -> None:
    key = serialization.load_pem_private_key(pair[1].read_bytes(), None)
    pair[1].write_bytes(key.private_bytes(PEM, form, PLAIN))
    assert subjects(server_tls(path, "cert: client.crt, key: client.key").identity) == ["CN=client"]


KEY = "cert: client.crt\n    key: client.key\n"


@pytest.mark.parametrize("form", [PKCS8, TRADITIONAL])
@pytest.mark.parametrize("place", [f"tls:\n    {KEY}", f"- name: a.b\n  tls:\n    {KEY}"])
def test_encrypted_key_is_refused_without_passphrase_prompt(
    path: Path,
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    form: serialization.PrivateFormat,
    place: str,
) -> None:
    key = serialization.load_pem_private_key(pair[1].read_bytes(), None)
    pair[1].write_bytes(key.private_bytes(PEM, form, ENCRYPTED))

    def prompt(*_: object) -> NoReturn:
        raise AssertionError("it asks")

    monkeypatch.setattr(crypto, "load_privatekey", prompt)
    line = len(place.splitlines())
    assert refusal(path, place).startswith(
        f"{path}:{line}: tls.key: {pair[1]} is encrypted: no passphrase can be entered"
    )


def damage(pem: Path) -> bytes:
    """Return the file's text with a few characters in the middle replaced."""
    data = pem.read_bytes()
    middle = len(data) // 2
    return data[:middle] + b"!!!!" + data[middle + 4 :]


ERRORS = [
    ("cert: nowhere, key: client.key", "cert", "nowhere cannot be read: No such file or directory"),
    ("cert: client.crt, key: nowhere", "key", "nowhere cannot be read: No such file or directory"),
    ("cert: ., key: client.key", "cert", "cannot be read: Is a directory"),
    ("cert: client.crt, key: .", "key", "cannot be read: Is a directory"),
    ("cert: '', key: client.key", "cert", "printable characters are expected"),
    ("cert: [client.crt], key: client.key", "cert", "a single value is expected"),
    ("cert: client.crt", "key", "is missing: a certificate and its key go together"),
    ("key: client.key", "cert", "is missing: a certificate and its key go together"),
    ("cert: client.key, key: client.key", "cert", "client.key holds no certificate in PEM form"),
    ("cert: client.der, key: client.key", "cert", "client.der holds no certificate in PEM form"),
    ("cert: damaged.crt, key: client.key", "cert", "damaged.crt: certificate 1 in it is damaged"),
    ("cert: chain.crt, key: client.key", "cert", "chain.crt: certificate 2 in it is damaged"),
    ("cert: client.crt, key: client.crt", "key", "client.crt holds no private key in PEM form"),
    ("cert: client.crt, key: damaged.key", "key", "damaged.key holds no private key in PEM form"),
    ("cert: client.crt, key: public.key", "key", "public.key holds no private key in PEM form"),
    ("cert: client.crt, key: openssh.key", "key", "openssh.key holds no private key in PEM form"),
    ("cert: client.crt, key: other.key", "key", "other.key is not the key of the certificate in"),
    ("cert: client.crt, key: rsa.key", "key", "rsa.key is not the key of the certificate in"),
    ("cert: client.crt, key: client.key, passphrase: x", "passphrase", "unknown key"),
    ("cert: client.crt, cert: client.crt", "cert", "duplicate key"),
]
ERRORS_OF_UPSTREAMS = [
    ("ca: nowhere", "ca", "nowhere cannot be read: No such file or directory"),
    ("ca: client.key", "ca", "client.key holds no certificate in PEM form"),
    ("ca: chain.crt", "ca", "chain.crt: certificate 2 in it is damaged"),
    ("insecure_skip_verify: yes", "insecure_skip_verify", "'yes': true or false is expected"),
    ("insecure_skip_verify: 1", "insecure_skip_verify", "'1': true or false is expected"),
    ("insecure_skip_verify: ''", "insecure_skip_verify", "'': true or false is expected"),
    ("client_ca: client.crt", "client_ca", "unknown key"),
]
ERRORS_OF_THE_SERVER = [
    ("client_ca: client.crt", "cert", "is missing: a certificate and its key go together"),
    ("cert: client.crt, key: client.key, client_ca: client.key", "client_ca", "holds no certificate in PEM form"),
    ("cert: client.crt, key: client.key, client_ca: nowhere", "client_ca", "cannot be read"),
    ("cert: client.crt, key: client.key, ca: client.crt", "ca", "unknown key"),
    ("insecure_skip_verify: true", "insecure_skip_verify", "unknown key"),
]
RSA = rsa.generate_private_key(65537, 2048)
OF_UPSTREAMS, OF_THE_SERVER = "- name: reg.example\n\n  tls: {%s}\n", "port: 1\n\ntls: {%s}\n"


@pytest.mark.parametrize(
    ("place", "text", "key", "why"),
    [
        *((place, *error) for place in (OF_UPSTREAMS, OF_THE_SERVER) for error in ERRORS),
        *((OF_UPSTREAMS, *error) for error in ERRORS_OF_UPSTREAMS),
        *((OF_THE_SERVER, *error) for error in ERRORS_OF_THE_SERVER),
    ],
)
def test_error_names_file_line_and_key(
    path: Path, authority: Authority, pair: tuple[Path, Path], place: str, text: str, key: str, why: str
) -> None:
    certificate, own = pair
    folder = path.parent
    authority.issue("other")
    private = serialization.load_pem_private_key(own.read_bytes(), None)
    openssh = serialization.PrivateFormat.OpenSSH
    public = private.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for name, data in {
        "client.der": x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(
            serialization.Encoding.DER
        ),
        "damaged.crt": damage(certificate),
        "damaged.key": damage(own),
        "chain.crt": certificate.read_bytes() + damage(authority.ca) + authority.ca.read_bytes(),
        "public.key": public,
        "openssh.key": private.private_bytes(PEM, openssh, PLAIN),
        "rsa.key": RSA.private_bytes(PEM, PKCS8, PLAIN),
    }.items():
        (folder / name).write_bytes(data)
    refused = refusal(path, place % text)
    assert refused.startswith(f"{path}:3: tls.{key}: ")
    assert why in refused


def weak(folder: Path) -> None:
    """Write a certificate with a key shorter than OpenSSL accepts."""
    key = rsa.generate_private_key(65537, 1024)
    name = x509.Name([])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    (folder / "client.crt").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(PEM))
    (folder / "client.key").write_bytes(key.private_bytes(PEM, PKCS8, PLAIN))


@pytest.mark.parametrize("place", [OF_UPSTREAMS, OF_THE_SERVER])
def test_weak_key_is_refused(path: Path, place: str) -> None:
    weak(path.parent)
    assert refusal(path, place % "cert: client.crt, key: client.key").startswith(f"{path}:3: tls.cert: ")


def test_missing_part_is_reported_at_its_place(path: Path, pair: tuple[Path, Path]) -> None:
    assert refusal(path, "- name: a.b\n  tls:\n    cert: client.crt\n").startswith(f"{path}:3: tls.key: is missing")


@pytest.mark.parametrize(
    "text", ["ca: test-authority.crt", "cert: client.crt, key: client.key", "insecure_skip_verify: true"]
)
def test_tls_with_http_is_refused(path: Path, pair: tuple[Path, Path], text: str) -> None:
    plain = "- name: a.b\n  scheme: http\n  tls: {%s}\n"
    assert refusal(path, plain % text) == f"{path}:3: tls: has no effect with scheme: http"
    assert read(path, plain % "").warnings == ()


def test_ca_without_verification_is_a_warning(path: Path, authority: Authority) -> None:
    config = read(path, "- name: reg.example\n  tls:\n    ca: test-authority.crt\n    insecure_skip_verify: true\n")
    (warning,) = config.warnings
    assert warning.startswith(f"{path}:3: tls.ca: has no effect with insecure_skip_verify: true")
    tls = config.registries[REG].tls
    assert not tls.verify
    assert tls.ca is not None
    two = "".join(f"- name: {name}\n  tls: {{ca: test-authority.crt, insecure_skip_verify: true}}\n" for name in "ab")
    assert [warned.partition(": ")[0] for warned in read(path, f"registries:\n{two}").warnings] == [
        f"{path}:3",
        f"{path}:5",
    ]


def test_printed_settings_contain_no_key(path: Path, pair: tuple[Path, Path]) -> None:
    text = "cert: client.crt, key: client.key"
    config = read(path, f"tls: {{{text}}}\nregistries:\n- name: a.b\n  tls: {{{text}}}\n")
    secrets = pair[1].read_text().splitlines()[1:-1]
    assert secrets
    for printed in (repr(config), str(config.tls), f"{config.registries}"):
        assert not any(secret in printed for secret in secrets)
        assert "PRIVATE KEY" not in printed
