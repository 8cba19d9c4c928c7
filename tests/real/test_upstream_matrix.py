"""Real upstreams of every kind: skopeo pulls through the daemon, or gets an error that the log explains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import digest_of
from tests.peers import missing_package
from tests.real.caches import assert_error, error_lines
from tests.real.upstream_matrix import CELLS, PASSWORD, USER, Cell, Matrix, Upstream

Skopeo = Callable[..., None]

SAMPLE = [cell for cell in CELLS if cell.sampled]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """One matrix for all tests of this file."""
    for program in ("docker-registry", "nginx"):
        if package := missing_package(program):
            pytest.fail(f"a peer is missing: apt-get install {package}", pytrace=False)
    with Matrix(tmp_path_factory.mktemp("matrix")) as matrix:
        yield matrix


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_sampled_kind_of_upstream(matrix: Matrix, cell: Cell, skopeo: Skopeo, tmp_path: Path) -> None:
    _check(matrix, cell, skopeo, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_kind_of_upstream(matrix: Matrix, cell: Cell, skopeo: Skopeo, tmp_path: Path) -> None:
    _check(matrix, cell, skopeo, tmp_path)


def _check(matrix: Matrix, cell: Cell, skopeo: Skopeo, folder: Path) -> None:
    with matrix.upstream(cell) as upstream:
        since = len(upstream.daemon.log)
        if cell.outcome[0] == 200:
            _assert_pulled(upstream, skopeo, folder / "copy")
            assert error_lines(upstream.daemon, since) == []
        else:
            _assert_refused(cell, upstream)
            with pytest.raises(RuntimeError, match=_SKOPEO_SAYS[cell.outcome[0]]):
                skopeo(upstream.ref, f"dir:{folder}/copy")
        _assert_nothing_revealed(cell, upstream)


_SKOPEO_SAYS = {404: "manifest unknown|401", 503: "503"}


def _assert_pulled(upstream: Upstream, skopeo: Skopeo, copy: Path) -> None:
    """Assert that skopeo gets the whole image, each blob fetched once, with one token for all."""
    skopeo(upstream.ref, f"dir:{copy}")
    copied = {digest_of(file.read_bytes()) for file in copy.iterdir() if file.name != "version"}
    blobs = [blob.digest for blob in upstream.image.blobs]
    assert copied == {upstream.image.manifest.digest, *blobs}
    fetched = [line.path.rpartition("/")[2] for line in upstream.registry.requests if "/blobs/" in line.path]
    assert sorted(fetched) == sorted(blobs)
    if upstream.tokens:
        assert upstream.tokens.offered == (f"{USER}:{PASSWORD}",)


def _assert_refused(cell: Cell, upstream: Upstream) -> None:
    """Assert that the client gets the right error, and that one log line names the upstream and the reason."""
    daemon, since = upstream.daemon, len(upstream.daemon.log)
    status, code = cell.outcome
    assert_error(fetch(upstream.url), status, code)
    *refusal, line = error_lines(daemon, since)
    # Wrong credentials, which concern all requests, have a line of their own.
    assert ["refused the user" in one for one in refusal] == [True] * (cell.login == "wrong_login")
    told = line.partition(f": {status} {code}: ")[2]
    assert upstream.name in told
    if cell.refuses:
        assert f"TLS failed: the certificate of CN={upstream.certificate} is refused: " in told
        assert cell.refuses in told.partition(" is refused: ")[2]
    elif status == 404:
        assert "401" in told
    else:
        # docker-registry ends the handshake, nginx first reads the request.
        assert ("TLS failed: " if cell.front == "docker_registry" else "400") in told


def _assert_nothing_revealed(cell: Cell, upstream: Upstream) -> None:
    """Assert that an unidentified server received no request and no password."""
    if cell.outcome[0] == 503:
        assert upstream.registry.requests == ()
    if upstream.tokens and cell.refuses:
        assert upstream.tokens.connections == 0
    if upstream.tokens and cell.login == "missing_login":
        assert set(upstream.tokens.offered) == {None}
