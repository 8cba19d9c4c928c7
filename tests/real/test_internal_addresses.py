"""Addresses that `ns`, redirects and token realms may not reach, in a network where a registry answers at each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.client import Response, fetch
from tests.images import Image
from tests.namespaces import Namespace, NamespacedDaemon
from tests.processes import Daemon
from tests.real.caches import assert_error, error_lines, plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_rules import Redirect

PUBLIC, OTHER_PUBLIC = "198.51.100.7", "198.51.100.8"
"""Addresses for documentation, routed only inside the namespace."""
METADATA = "169.254.169.254"
PORTS = (80, 443, 5000)
HOSTS = f"""\
127.0.0.1 localhost inside.example
::1 inside6.example
{METADATA} keys.example
{PUBLIC} public.example
{PUBLIC} both.example
127.0.0.1 both.example
"""
IMAGE = plain_image("where", 1000)
DAEMON_PORT = 8080

NAMES = (
    "127.0.0.1:5000",
    "127.0.0.1",
    "localhost",
    "localhost:5000",
    "127.1",
    "127.1:5000",
    "0x7f000001",
    "2130706433",
    "017700000001:5000",
    "[::1]",
    "[::1]:5000",
    "::1",
    "::ffff:127.0.0.1",
    "[::ffff:127.0.0.1]:5000",
    "[::ffff:7f00:1]:5000",
    "[::127.0.0.1]:5000",
    "[64:ff9b::127.0.0.1]:5000",
    "0.0.0.0",
    "0.0.0.0:5000",
    "[::]:5000",
    METADATA,
    f"{METADATA}:5000",
    "[fe80::1]:5000",
    "224.0.0.1:5000",
    "inside.example:5000",
    "inside6.example:5000",
    "keys.example",
    "keys.example:5000",
    "both.example:5000",
    f"127.0.0.1:{DAEMON_PORT}",
)


class AddressNetwork:
    """A namespace with registries at its addresses, and a daemon in it; `close` ends them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self.namespace = stack.enter_context(Namespace("ns"))
        for address in (PUBLIC, OTHER_PUBLIC, METADATA):
            self.namespace.ip("address", "add", f"{address}/32", "dev", "lo")
        (folder / "hosts").write_text(HOSTS)
        self.public = self._registry(PUBLIC, 5000)
        self.other = self._registry(OTHER_PUBLIC, 5000)
        self.inside = [self._registry(address, port) for address in ("127.0.0.1", METADATA) for port in PORTS]
        self.inside += [self._registry("::1", port) for port in PORTS]

    def _registry(self, address: str, port: int) -> ScriptedRegistry:
        registry = self.namespace.call(lambda: ScriptedRegistry(address=address, port=port))
        self._stack.enter_context(registry)
        registry.add("team/app", IMAGE, "1")
        return registry

    def at(self, address: str, port: int) -> ScriptedRegistry:
        """Return the registry there."""
        return next(one for one in self.inside if one.host == f"{address}:{port}")

    def daemon(self, registries: Mapping[str, object], *options: str) -> Daemon:
        """Start a daemon with these upstreams in its configuration, until the end of the test."""
        daemon = NamespacedDaemon(self.namespace, self.folder, registries, *options, port=DAEMON_PORT)
        # `ip netns exec` makes a mount namespace for its process.
        hosts = f"mount --bind {self.folder}/hosts /etc/hosts"
        start = len(self.namespace.argv([]))
        daemon.argv[start:start] = ["sh", "-euc", f'{hosts}; exec "$@"', "sh"]
        return self._stack.enter_context(daemon)

    def ask(self, daemon: Daemon, ns: str, path: str = "team/app/manifests/1") -> Response:
        """Send a request to the daemon."""
        url = f"{daemon.url}/v2/{path}?ns={quote(ns, safe='')}"
        return self.namespace.call(lambda: fetch(url))

    @property
    def forbidden_connections(self) -> dict[str, int]:
        """Return how many connections the registries at forbidden addresses have received."""
        return {one.host: one.connections for one in self.inside if one.connections}


@pytest.fixture
def network(tmp_path: Path) -> Iterator[AddressNetwork]:
    """The network."""
    with ExitStack() as stack:
        yield AddressNetwork(tmp_path, stack)


def assert_refused(network: AddressNetwork, daemon: Daemon, ns: str, path: str = "team/app/manifests/1") -> None:
    """Assert a 403 with the reason, one line in the log, and no connection to a forbidden address."""
    since = len(daemon.log)
    answer = network.ask(daemon, ns, path)
    assert_error(answer, 403, "DENIED")
    assert b" address " in answer.body
    assert len(error_lines(daemon, since)) == 1
    assert network.forbidden_connections == {}


def test_ns_with_an_internal_address_is_refused(network: AddressNetwork) -> None:
    daemon = network.daemon({})
    assert network.ask(daemon, "public.example:5000").body == IMAGE.manifest.data
    for ns in NAMES:
        assert_refused(network, daemon, ns)
    assert_refused(network, daemon, "127.0.0.1:5000", f"team/app/blobs/sha256:{'0' * 64}")
    assert_refused(network, daemon, "127.0.0.1:5000", "team/app/tags/list")
    assert_refused(network, daemon, "127.0.0.1:5000", f"team/app/referrers/{IMAGE.manifest.digest}")
    in_path = network.namespace.call(lambda: fetch(f"{daemon.url}/v2/localhost:5000/team/app/manifests/1"))
    assert_error(in_path, 403, "DENIED")
    assert network.forbidden_connections == {}


@pytest.mark.parametrize("inside", ["http://127.0.0.1:5000", "http://inside.example:5000", f"http://{METADATA}"])
def test_redirect_or_realm_to_an_internal_address_is_refused(network: AddressNetwork, inside: str) -> None:
    """By a redirect, and by the realm of its token service."""
    daemon = network.daemon({f"{PUBLIC}:5000": "http"})
    network.public.script("*/manifests/*", Redirect(inside))
    assert_refused(network, daemon, f"{PUBLIC}:5000")
    network.public.script("*/blobs/*", Tokens(f"{inside}/token"))
    assert_refused(network, daemon, f"{PUBLIC}:5000", f"team/app/blobs/sha256:{'0' * 64}")


@pytest.mark.parametrize(
    ("ns", "address"),
    [
        ("127.0.0.1:5000", "127.0.0.1"),
        ("localhost:5000", "127.0.0.1"),
        ("127.1:5000", "127.0.0.1"),
        ("2130706433:5000", "127.0.0.1"),
        ("[::1]:5000", "[::1]"),
        ("inside6.example:5000", "[::1]"),
        (f"{METADATA}:5000", METADATA),
    ],
)
def test_configured_internal_upstream_is_served(network: AddressNetwork, ns: str, address: str) -> None:
    daemon = network.daemon({ns: "http"})
    assert network.ask(daemon, ns).body == IMAGE.manifest.data
    assert network.forbidden_connections == {f"{address}:5000": 1}
    refused_other = network.ask(daemon, "127.0.0.1:443")
    assert_error(refused_other, 403, "DENIED")
    assert list(network.forbidden_connections) == [f"{address}:5000"]


def assert_pulled(network: AddressNetwork, daemon: Daemon, image: Image) -> None:
    """Assert that the whole image comes from the public registry through its redirects."""
    for path in ("manifests/1", *(f"blobs/{blob.digest}" for blob in image.blobs)):
        assert network.ask(daemon, f"{PUBLIC}:5000", f"team/app/{path}").status == 200


def test_configured_realm_and_storage_are_reached(network: AddressNetwork) -> None:
    """The token service by `realm` or by an entry, the storage by an entry."""
    tokens = Tokens("http://inside.example/token")
    daemon = network.daemon(
        {
            f"{PUBLIC}:5000": {"scheme": "http", "auth": {"realm": "inside.example"}},
            "127.0.0.1:5000": "http",
        }
    )
    network.public.script("*/blobs/*", Redirect("http://127.0.0.1:5000"))
    network.public.script("*", tokens)
    network.at("127.0.0.1", 80).script("/token", tokens)
    assert_pulled(network, daemon, IMAGE)
    assert set(network.forbidden_connections) == {"127.0.0.1:80", "127.0.0.1:5000"}


def test_allow_upstreams_does_not_permit_internal_addresses(network: AddressNetwork) -> None:
    """A disallowed upstream is not even looked up; an allowed one still may not lead inside."""
    daemon = network.daemon({f"{PUBLIC}:5000": "http"}, "--allow-upstreams", f"{PUBLIC}:*,inside.*")
    assert network.ask(daemon, f"{PUBLIC}:5000").status == 200
    answer = network.ask(daemon, f"{OTHER_PUBLIC}:5000")
    assert_error(answer, 403, "DENIED")
    assert b"allow-upstreams" in answer.body
    assert network.other.connections == 0
    assert_refused(network, daemon, "inside.example:5000")
