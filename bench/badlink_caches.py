"""The caches to compare, each with a separate folder and a bad link to its upstream."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from tests.images import Image
from tests.peers import DockerRegistry
from tests.processes import Daemon, Server, answers, free_port

REPOSITORY, TAG = "bench/app", "1"
DRAYAGE = "drayage==0.2.9"
_INSTALLS = 300


@dataclass(frozen=True)
class Place:
    """Where a cache runs: its folder, the host at the end of its bad link, and the registry with the image there."""

    folder: Path
    link: str
    registry: DockerRegistry
    image: Image


@dataclass(frozen=True)
class Cache:
    """A cache that is not started yet, the URL of a path below /v2/, and a mirror that must run before the cache."""

    server: Server
    url: Callable[[str], str]
    mirror: AbstractContextManager[object] = field(default_factory=nullcontext)


class Drayage(Server):
    """drayage as configured by `drayage init`, with one upstream, to which plain names belong."""

    def __init__(self, program: Path, folder: Path, upstream: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        # It requires the folder, and does not create it.
        cache = folder / "cache"
        cache.mkdir(parents=True)
        config = folder / "config.toml"
        config.write_text(
            f'listen = "{self.url.removeprefix("http://")}"\ncache_dir = "{cache}"\nmanifest_ttl_seconds = 900\n'
            f'[upstreams.docker_io]\nregistry = "{upstream}"\n'
        )
        super().__init__([str(program), "serve", "-c", str(config)], folder / "drayage.log")

    def ready(self) -> bool:
        """Whether it reports that it is ready."""
        return answers(f"{self.url}/readyz")


def ours(place: Place, *mirrors: str) -> Cache:
    """Make our daemon, which asks these mirrors first; `ns` names the upstream."""
    daemon = Daemon(place.folder, {place.link: {"scheme": "http", "mirrors": list(mirrors)}}, "--log-level", "warn")
    return Cache(daemon, lambda path: below_v2(daemon, place, path))


def below_v2(daemon: Daemon, place: Place, path: str) -> str:
    """Return the URL of a path below /v2/ of one of our daemons."""
    return f"{daemon.url}/v2/{path}?ns={quote(place.link, safe='')}"


def docker_registry(place: Place) -> Cache:
    """Make Debian's docker-registry as a proxy."""
    registry = DockerRegistry(place.folder, sections={"proxy": {"remoteurl": f"http://{place.link}"}})
    return Cache(registry, lambda path: f"{registry.url}/v2/{path}")


def drayage(place: Place) -> Cache:
    """Make drayage, from the venv beside the folder."""
    server = Drayage(drayage_program(place.folder.parent), place.folder, f"http://{place.link}")
    return Cache(server, lambda path: f"{server.url}/v2/{path}")


CACHES: dict[str, Callable[[Place], Cache]] = {
    "ociregistry": ours,
    "docker-registry": docker_registry,
    "drayage": drayage,
}


def missing(name: str, root: Path) -> str | None:
    """Return why this cache cannot run, or None. drayage is installed below `root`."""
    if name == "docker-registry":
        return None if shutil.which(name) else "not installed: apt-get install docker-registry"
    if name == "drayage" and not drayage_program(root).exists():
        venv = str(_venv(root))
        steps = [[sys.executable, "-m", "venv", venv], [f"{venv}/bin/pip", "install", "-q", DRAYAGE]]
        for step in steps:
            try:
                subprocess.run(step, check=True, capture_output=True, text=True, timeout=_INSTALLS)
            except (OSError, subprocess.SubprocessError) as problem:
                return f"not installed: {getattr(problem, 'stderr', None) or problem}".strip()[-200:]
    return None


def drayage_program(root: Path) -> Path:
    """Return the program that `missing` installs."""
    return _venv(root) / "bin" / "drayage"


def _venv(root: Path) -> Path:
    return root / "drayage"
