"""Every command in the documentation is run literally, or a line above it says why not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.documents import PAGES, README, ROOT, Block, blocks
from tests.images import Image, Index, make_image, make_index
from tests.namespaces import Namespace
from tests.peers import Containerd, missing_package
from tests.processes import wait_until
from tests.real.machines import Machine, Running

_FIRST_PULL = "A first pull"
"""The section of the README that test_readme.py runs."""
_LONG_RUNNING = ("--log-level info", "--preload-images imagelist --concurrent 2", "127.0.0.1:5000")
"""The ends of blocks that run until they are terminated."""
_TYPED = '{"down": true}'
"""A line that a page shows among the output, and that is typed."""
_SOON = 60

OTHERS = ("linux/arm64", "linux/s390x")
IMAGES: dict[str, Image | Index] = {
    "registry.k8s.io/pause:3.8": make_index("docs pause"),
    "registry.k8s.io/kube-scheduler:v1.29.1": make_index("docs scheduler"),
    "quay.io/jetstack/cert-manager-controller:v1.11.2": make_index("docs cert-manager"),
    "docker.io/kubernetesui/dashboard-web:v1.0.0": make_index("docs web", platforms=OTHERS),
    "docker.io/kubernetesui/dashboard:v2.7.0": make_index("docs dashboard"),
    "docker.io/curlimages/curl:8.6.0": make_image("docs curl"),
    "docker.io/calico/typha:v3.27.0": make_index("docs typha"),
    "docker.io/library/nginx:1.25": make_index("docs nginx"),
}


def runnable(page: Path) -> list[Block]:
    """Return the blocks of a page that this file has to run."""
    commands = [block for block in blocks(page) if block.language == "sh" and block.not_run is None]
    return [block for block in commands if (page, block.heading) != (README, _FIRST_PULL)]


def shown_after(block: Block) -> list[str]:
    """Return the lines of output that the page shows below a block, before the next one under the same heading."""
    of_page = blocks(block.page)
    following = [one for one in of_page[of_page.index(block) + 1 :] if one.heading == block.heading]
    if following and following[0].language == "text":
        return following[0].text.splitlines()
    return []


def like(line: str) -> str:
    """Return the pattern of a line, independent of numbers, digests and blanks."""
    line = re.sub(r"\b([0-9a-f]{64}\b|[0-9a-f]+…)", "<hex>", line)
    return re.sub(r"\d+", "0", " ".join(line.split()))


def assert_shown(block: Block, printed: str, home: Path) -> None:
    """Assert that each line that the page shows matches the end of a printed one."""
    printed = printed.replace(str(home), "/home/me")
    seen = [like(line) for line in printed.splitlines()]
    for line in shown_after(block):
        assert any(one.endswith(like(line)) for one in seen), f"{block}: no line like {line!r} in:\n{printed}"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """One machine for all pages, and the registries of the Internet."""
    missing = {missing_package(one) for one in ("docker-registry", "containerd", "ctr", "skopeo", "unshare")} - {None}
    missing |= {one for one in ("curl", "jq", "rsync") if shutil.which(one) is None}
    if missing:
        pytest.fail(f"missing: apt-get install {' '.join(map(str, missing))}", pytrace=False)
    with ExitStack() as stack:
        # Not pytest's own folder: the path of a socket in it must be short, and the files need not be kept.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="docs-")))
        machine = Machine(folder, stack.enter_context(Namespace("docs")), IMAGES)
        machine.set_up()
        stack.enter_context(machine.registries())
        yield machine


class User:
    """Types the commands of a page from beginning to end."""

    def __init__(self, machine: Machine, stack: ExitStack) -> None:
        self.machine = machine
        self._stack = stack
        self.terminal: Running | None = None

    def serve(self) -> None:
        """Run the daemon as the service of the package does, if it does not run."""
        if not self.machine.serves():
            daemon = self._start("ociregistry --config-path /etc/ociregistry/ociregistry.yaml --log-level info")
            wait_until(lambda: self.machine.serves() or not daemon.runs, _SOON, "the daemon serves")
            assert daemon.runs, daemon.printed

    def _start(self, script: str) -> Running:
        if self.terminal is not None:
            self.terminal.end()
        self.terminal = self.machine.start(script)
        self._stack.callback(self.terminal.end)
        return self.terminal

    def type(self, block: Block) -> None:
        """Run a block, and compare its output with the page."""
        shown = shown_after(block)
        if not block.text.rstrip().endswith(_LONG_RUNNING):
            done = self.machine.run(block.text)
            status = 1 if any(line.startswith("failed: ") for line in shown) else 0
            assert done.returncode == status, (str(block), done)
            log = self.terminal.printed if self.terminal else ""
            assert_shown(block, done.stdout + log, self.machine.home)
            return
        terminal = self._start(block.text)
        typed = [line for line in shown if line == _TYPED]
        for line in typed:
            wait_until(lambda: '"port"' in terminal.printed, _SOON, "the link listens")
            terminal.type(f"{line}\n")
            wait_until(lambda: '"dialled"' in terminal.printed, _SOON, "the link answers")
        if not typed:
            wait_until(lambda: self.machine.serves() or not terminal.runs, _SOON, "the daemon serves")
        assert terminal.runs, (str(block), terminal.printed)
        assert_shown(block, "\n".join([terminal.printed, *typed]), self.machine.home)

    def containerd(self) -> None:
        """Run a containerd where ctr looks for it."""
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="docs-containerd-")))
        containerd = Containerd(folder)
        containerd.argv = self.machine.inside(containerd.argv)
        self._stack.enter_context(containerd)
        # This snapshotter works on every machine.
        self.machine.environment |= {
            "CONTAINERD_ADDRESS": str(folder / "containerd.sock"),
            "CONTAINERD_SNAPSHOTTER": "native",
        }

    def loaded(self, listed: str = "imagelist") -> None:
        """Load these images into the store."""
        self.machine.done(f"ociregistry load {listed}")


@pytest.fixture
def user(machine: Machine) -> Iterator[User]:
    """A user at an unused machine."""
    machine.wipe()
    with ExitStack() as stack:
        yield User(machine, stack)


def before_containerd(user: User) -> None:
    user.containerd()
    user.serve()


def before_kubernetes(user: User) -> None:
    user.containerd()
    user.loaded()


def before_loading(user: User) -> None:
    user.machine.done("echo nginx:1.25 > first")
    user.loaded("first")


BEFORE: dict[str, Callable[[User], None]] = {
    "containerd.md": before_containerd,
    "debian.md": User.serve,
    "kubernetes.md": before_kubernetes,
    "loading.md": before_loading,
    "metrics.md": User.serve,
    "pruning.md": User.loaded,
    "several-machines.md": User.loaded,
}
"""What a page presupposes."""


def names(store: Path) -> set[str]:
    """Return the files in a store, without work in progress."""
    return {str(path.relative_to(store)) for path in store.glob("*/*") if path.parent.name != "pulls"}


def after_replicating(user: User) -> None:
    here, there = names(user.machine.store), names(user.machine.other)
    assert here == there != set()
    assert not (user.machine.other / "pulls").exists()


def after_loading(user: User) -> None:
    after_replicating(user)
    (shown,) = (json.loads(block.text) for block in blocks(ROOT / "docs" / "loading.md") if block.language == "json")
    health = user.machine.health()
    assert {key: set(value) for key, value in shown.items()} == {"preload": set(health["preload"])}


def after_kubernetes(user: User) -> None:
    images = user.machine.done("ctr --namespace k8s.io images list --quiet").split()
    assert "registry.k8s.io/pause:3.8" in images


def after_several_machines(user: User) -> None:
    after_replicating(user)
    hosts = tomllib.loads((user.machine.etc / "containerd/certs.d/_default/hosts.toml").read_text())
    assert list(hosts["host"]) == ["http://10.0.0.1:8080", "http://10.0.0.2:8080"]


def after_pruning(user: User) -> None:
    listed = user.machine.done("ociregistry list")
    assert "calico/typha" in listed
    assert "curl" not in listed


AFTER: dict[str, Callable[[User], None]] = {
    "kubernetes.md": after_kubernetes,
    "loading.md": after_loading,
    "pruning.md": after_pruning,
    "several-machines.md": after_several_machines,
}
"""What must hold after a page's commands."""


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_commands_of_a_page_print_what_it_shows(user: User, page: Path) -> None:
    BEFORE.get(page.name, lambda _: None)(user)
    for block in runnable(page):
        user.type(block)
    AFTER.get(page.name, lambda _: None)(user)


def test_readme_commands_are_tested_elsewhere() -> None:
    """The README's commands are in the section that test_readme.py runs, where it expects them."""
    assert not runnable(README)
    assert {*BEFORE, *AFTER} <= {page.name for page in PAGES if runnable(page)}
    assert [block.language for block in blocks(README) if block.heading == _FIRST_PULL] == ["sh", "text", "sh"]


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page) if block.not_run], ids=str)
def test_reason_of_a_block_that_is_not_run_names_existing_tests(block: Block) -> None:
    assert block.language == "sh"
    named = re.findall(r"\btests/[\w/]+\.py\b|\.ci/run\b", block.not_run or "")
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_reason_is_directly_above_a_block_of_commands(page: Path) -> None:
    """A reason elsewhere would excuse nothing."""
    assert page.read_text().count("<!--") == sum(block.not_run is not None for block in blocks(page))


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.fail("missing: apt-get install systemd", pytrace=False)
    (unit,) = (block.text for page in PAGES for block in blocks(page) if "[Unit]" in block.text)
    assert unit.count("/opt/ociregistry/bin/ociregistry ") == 1
    path = tmp_path / "ociregistry.service"
    path.write_text(unit.replace("/opt/ociregistry/bin/ociregistry", sys.executable))
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
