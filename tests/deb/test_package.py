"""The package on a running Debian, in an administrator's order, from installation to purge."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from ociregistry import __version__
from tests.deb.installation import CONFIG, DAEMON, LOADED, MANIFEST, REFERENCE, STORE, UPSTREAM, Installation
from tests.documents import blocks
from tests.processes import ROOT, wait_until

_SOON = 20
_MOST_EXPOSED = 1.2
_SOCKET = "/etc/systemd/system/ociregistry.socket"
_SEVERAL = "More than one core"
_ELSEWHERE = "/srv/images"
_DROP_IN = "/etc/systemd/system/ociregistry.service.d"
_LISTEN = 'listen: ["systemd:domain=INET6:index=0"]'
_ASK = f"""
import concurrent.futures, time, urllib.request

def ask(number):
    time.sleep(number / 20)
    try:
        with urllib.request.urlopen("{MANIFEST}", timeout=60) as answer:
            return answer.status
    except OSError as error:
        return error

print("asking", flush=True)
with concurrent.futures.ThreadPoolExecutor(40) as pool:
    print(*pool.map(ask, range(40)), sep="\\n")
"""


@pytest.fixture(autouse=True)
def journal_in_failure_report(installation: Installation, request: pytest.FixtureRequest) -> Iterator[None]:
    """Add the unit's log to the report of a failed test."""
    yield
    journal = installation.machine.run("journalctl --unit ociregistry --lines 20 --no-pager", check=False)
    request.node.add_report_section("teardown", "journal", journal.stdout)


def test_installation_starts_and_enables_the_service(installation: Installation) -> None:
    machine = installation.machine
    assert machine.says("systemctl is-active ociregistry") == "active"
    assert machine.says("systemctl is-enabled ociregistry") == "enabled"
    assert installation.status(f"{DAEMON}/v2/") == "200"
    assert [installation.status(f"http://localhost:8081/{path}") for path in ("", "page.js")] == ["200", "200"]
    assert machine.says(f"stat -c '%U:%G %a' {CONFIG}") == "root:ociregistry 640"
    assert machine.says(f"stat -c '%U:%G %a' {STORE}") == "ociregistry:ociregistry 750"
    assert machine.shows("ociregistry", "WatchdogUSec") == "30s"
    assert {"kubelet.service", "k3s.service", "k3s-agent.service"} <= set(
        machine.shows("ociregistry", "Before").split()
    )
    assert machine.says("systemctl --failed --no-legend") == ""


def test_autopkgtest_passes(installation: Installation) -> None:
    """Run the test of debian/tests, as autopkgtest would."""
    shutil.copy(ROOT / "debian" / "tests" / "serves", installation.machine.path("/srv/serves"))
    installation.machine.run("/srv/serves")


def test_unit_is_sandboxed(installation: Installation) -> None:
    said = installation.machine.says("systemd-analyze security --no-pager ociregistry").splitlines()[-1]
    exposure = re.search(r"exposure level for ociregistry.service: ([0-9.]+)", said)
    assert exposure is not None, said
    assert float(exposure[1]) <= _MOST_EXPOSED


def test_reload_applies_changed_upstream_entry(installation: Installation) -> None:
    """Before the reload `ns` may not lead to the upstream; after it the pull works, with the private authority."""
    process = installation.machine.shows("ociregistry", "MainPID")
    assert installation.status(MANIFEST) == "403"
    installation.configure_the_upstream()
    installation.machine.run("systemctl reload ociregistry")
    wait_until(
        lambda: installation.status(MANIFEST) == "200", _SOON, "the manifest through TLS with the private authority"
    )
    assert installation.machine.shows("ociregistry", "MainPID") == process
    assert installation.machine.says("systemctl is-active ociregistry") == "active"


def test_changed_configuration_takes_effect_without_a_reload(installation: Installation) -> None:
    """systemd, which the daemon tells of it, goes on as before."""
    machine = installation.machine
    process = machine.shows("ociregistry", "MainPID")

    def reloads() -> int:
        return machine.says("journalctl --unit ociregistry --no-pager").count("settings reloaded")

    before = reloads()
    with machine.path(CONFIG).open("a") as config:
        config.write("# changed\n")
    wait_until(lambda: reloads() > before, _SOON, "the change is noticed")
    wait_until(lambda: machine.says("systemctl is-active ociregistry") == "active", _SOON, "it is active again")
    assert machine.shows("ociregistry", "MainPID") == process


def test_containerd_pulls_by_cri_with_and_without_the_upstream(installation: Installation) -> None:
    """Pull through the CRI plugin, as a kubelet does. Only the unit knows the authority of the upstream."""
    assert "certificate" in installation.pull(), "only the unit knows the authority"
    installation.configure_containerd()
    assert installation.pull() == ""
    assert REFERENCE in installation.cri.images()
    blobs = [blob.digest.removeprefix("sha256:") for blob in installation.image.blobs]
    wait_until(lambda: {*blobs} <= {*installation.machine.says(f"ls {STORE}/blobs").split()}, _SOON, "all blobs")
    installation.machine.run("systemctl stop docker-registry && systemctl restart ociregistry")
    assert installation.pull() == ""
    assert REFERENCE in installation.cri.images()
    assert installation.pull_by_ctr() == ""


def test_load_as_root_leaves_no_file_of_root(installation: Installation) -> None:
    """The unit fetches, by the private authority that it knows; no file belongs to root afterwards."""
    machine = installation.machine
    machine.write("/root/imagelist", f"# what the cluster needs\n{LOADED}\n{REFERENCE}\n")
    machine.run("systemctl start docker-registry")
    said = machine.says("cd /root && ociregistry load imagelist").splitlines()
    machine.run("systemctl stop docker-registry")
    size = sum(len(blob.data) for blob in installation.loaded.blobs)
    assert f"loaded: {LOADED}: 3 blobs, {size} bytes" in said
    assert f"already there: {REFERENCE}" in said
    assert machine.says(f"find {STORE} ! -user ociregistry") == ""
    assert installation.status(f"{DAEMON}/v2/team/loaded/manifests/1?ns={UPSTREAM}") == "200"


def test_commands_as_root_while_the_unit_runs(installation: Installation) -> None:
    """Run the documented commands as root; no file belongs to root afterwards."""
    machine = installation.machine
    assert machine.says("ociregistry --version") == f"ociregistry {__version__}"
    assert f"/etc/ociregistry/{UPSTREAM}.crt" in machine.says("ociregistry check")
    assert [line.split()[0] for line in machine.says("ociregistry list").splitlines()] == [REFERENCE, LOADED]
    assert machine.says("ociregistry prune --unused-for 30d --dry-run").startswith("0 image URLs, ")
    would = machine.says("ociregistry prune --pattern team/loaded --dry-run")
    assert would.startswith(f"would prune {LOADED} ")
    assert machine.says("ociregistry verify").endswith(" verified, 0 damaged")
    machine.run("cd /root && ociregistry export --pattern team/loaded -o images.tar")
    assert machine.says("stat -c %U /root/images.tar") == "root"
    assert machine.says("ociregistry prune --pattern team/loaded").startswith(f"pruned {LOADED} ")
    assert machine.says("cd /root && ociregistry load images.tar").startswith(f"loaded: {LOADED}: ")
    assert machine.says(f"find {STORE} ! -user ociregistry") == ""
    assert machine.says("ociregistry list | wc -l") == "2"


def test_load_as_root_before_the_first_start_makes_the_store_of_the_service(installation: Installation) -> None:
    """With the archive of the test before."""
    machine = installation.machine
    machine.run(f"systemctl stop ociregistry && mv {STORE} {STORE}.kept")
    assert machine.says("cd /root && ociregistry load images.tar").startswith(f"loaded: {LOADED}: ")
    assert machine.says(f"find {STORE} ! -user ociregistry") == ""
    assert machine.says(f"stat -c '%U:%G %a' {STORE}") == "ociregistry:ociregistry 750"
    machine.run(f"rm -r {STORE} && mv {STORE}.kept {STORE} && systemctl start ociregistry")


def test_image_path_on_another_folder(installation: Installation) -> None:
    """Follow the documentation. Commands find the store, since they read the same file."""
    machine = installation.machine
    config = machine.path(CONFIG).read_text()
    moved = {
        CONFIG: f"image_path: {_ELSEWHERE}\n{config}",
        f"{_DROP_IN}/store.conf": f"[Service]\nReadWritePaths={_ELSEWHERE}\n",
    }
    with installation.changed(moved):
        machine.run(f"systemctl stop ociregistry && cp --archive {STORE} {_ELSEWHERE}")
        machine.run("systemctl start ociregistry")
        assert installation.status(MANIFEST) == "200"
        machine.run(f"rm {_ELSEWHERE}/img/*")
        wait_until(lambda: installation.status(MANIFEST) != "200", _SOON, "the daemon reads the new store")
        assert machine.says("ociregistry list") == ""
        assert machine.says("ociregistry load /root/images.tar").startswith(f"loaded: {LOADED}\n")
        assert machine.says("ociregistry list").startswith(LOADED)
        assert machine.says(f"find {_ELSEWHERE} ! -user ociregistry") == ""
    machine.run(f"rm -r {_ELSEWHERE}")
    assert installation.status(MANIFEST) == "200"


@pytest.fixture
def short_watchdog(installation: Installation) -> Iterator[None]:
    """Set a shorter watchdog time-out than the package's, because the test waits for it."""
    with installation.changed({f"{_DROP_IN}/impatient.conf": "[Service]\nWatchdogSec=2s\n"}):
        installation.machine.run("systemctl restart ociregistry")
        yield


def test_watchdog_restarts_a_hung_daemon(installation: Installation, short_watchdog: None) -> None:
    machine = installation.machine
    time.sleep(5)
    process = machine.shows("ociregistry", "MainPID")
    assert machine.shows("ociregistry", "NRestarts") == "0", "the watchdog was not notified"
    machine.run(f"kill -STOP {process}")
    wait_until(lambda: machine.shows("ociregistry", "NRestarts") == "1", _SOON, "a restart by the watchdog")
    wait_until(lambda: installation.status(MANIFEST) == "200", _SOON, "a hit again")
    assert machine.shows("ociregistry", "MainPID") != process
    assert "Watchdog timeout" in machine.says("journalctl --unit ociregistry --no-pager")


def test_invalid_configuration_fails_without_a_restart_loop(installation: Installation) -> None:
    config = installation.machine.path(CONFIG)
    with installation.changed({CONFIG: f"prot: 1\n{config.read_text()}"}):
        assert not installation.machine.is_so("systemctl restart ociregistry")
        assert installation.machine.says("systemctl is-active ociregistry || true") == "failed"
        assert f"{CONFIG}:1: prot: " in installation.machine.says(
            "journalctl --unit ociregistry --no-pager --lines 10"
        )


@pytest.fixture
def socket_activation(installation: Installation) -> Iterator[None]:
    """Set up the socket unit as its own comments say."""
    example = installation.machine.path("/usr/share/doc/ociregistry/examples/ociregistry.socket").read_text()
    assert _LISTEN in example
    config = installation.machine.path(CONFIG).read_text()
    with installation.changed({_SOCKET: example, CONFIG: f"{_LISTEN}\n{config}"}):
        installation.machine.run("systemctl stop ociregistry && systemctl enable --now ociregistry.socket")
        installation.machine.run("systemctl start ociregistry")
        yield
        installation.machine.run("systemctl disable --now ociregistry.socket")


def test_no_request_is_refused_during_a_restart_with_the_socket_unit(
    installation: Installation, socket_activation: None
) -> None:
    """Send 40 requests within two seconds, and restart in between."""
    machine = installation.machine
    process = machine.shows("ociregistry", "MainPID")
    with subprocess.Popen(machine.argv(["python3", "-c", _ASK]), stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "asking\n"
        time.sleep(0.4)
        machine.run("systemctl restart ociregistry")
        assert asking.poll() is None, "the restart came too late"
        told, _ = asking.communicate(timeout=60)
    assert machine.shows("ociregistry", "MainPID") != process
    assert told.split("\n") == ["200"] * 40 + [""]


def test_several_daemons_share_a_port_and_the_store(installation: Installation) -> None:
    """As docs/debian.md says; when one is killed, no request is refused."""
    machine = installation.machine
    described = [block for block in blocks(ROOT / "docs/debian.md") if block.heading == _SEVERAL]
    sockets, commands = (block.text for block in described)
    config = machine.path(CONFIG).read_text()
    template = "/etc/systemd/system/ociregistry@"
    with installation.changed({f"{template}.socket": sockets, CONFIG: f"{_LISTEN}\n{config}"}):
        try:
            machine.run(commands)
            processes = [machine.shows(f"ociregistry@{number}", "MainPID") for number in (1, 2)]
            assert {installation.status(MANIFEST) for _ in range(20)} == {"200"}
            machine.run(f"kill -9 {processes[0]}")
            assert {installation.status(MANIFEST) for _ in range(20)} == {"200"}
            wait_until(lambda: machine.shows("ociregistry@1", "ActiveState") == "active", _SOON, "it is back")
            assert machine.shows("ociregistry@1", "MainPID") not in processes
            assert machine.shows("ociregistry@2", "MainPID") == processes[1]
        finally:
            units = "ociregistry@1.socket ociregistry@2.socket ociregistry@1 ociregistry@2"
            machine.run(f"systemctl disable --now {units}; rm {template}.service", check=False)
            machine.run("systemctl daemon-reload && systemctl enable ociregistry")


def test_upgrade_keeps_edited_configuration_and_store(installation: Installation) -> None:
    machine = installation.machine
    edited = machine.path(CONFIG).read_text()
    kept = machine.says(f"cd {STORE} && find blobs fat img -type f | sort")
    tree = "/srv/next"
    machine.run(f"dpkg-deb --raw-extract /srv/ociregistry.deb {tree}")
    machine.run(f"sed -i 's/^Version: .*/&+next/' {tree}/DEBIAN/control && echo '# next' >> {tree}{CONFIG}")
    machine.run(f"dpkg-deb --build {tree} /srv/next.deb")
    machine.run("apt-get install --yes -o Dpkg::Options::=--force-confold /srv/next.deb </dev/null")
    assert machine.says("dpkg-query -Wf '${Version}' ociregistry").endswith("+next")
    assert machine.path(CONFIG).read_text() == edited
    assert machine.path(f"{CONFIG}.dpkg-dist").read_text().endswith("# next\n")
    assert machine.says(f"stat -c '%U:%G %a' {CONFIG}") == "root:ociregistry 640"
    assert machine.says(f"cd {STORE} && find blobs fat img -type f | sort") == kept
    wait_until(lambda: installation.status(MANIFEST) == "200", _SOON, "a hit after the upgrade")
    assert installation.pull() == ""


def test_removal_keeps_the_store_and_purge_leaves_nothing(installation: Installation) -> None:
    machine = installation.machine
    machine.run("apt-get remove --yes ociregistry </dev/null")
    assert installation.status(f"{DAEMON}/v2/") == "000"
    assert machine.says(f"ls {STORE}/blobs") != ""
    assert UPSTREAM in machine.path(CONFIG).read_text()
    machine.path(f"/etc/ociregistry/{UPSTREAM}.crt").unlink()
    machine.run("apt-get purge --yes ociregistry </dev/null")
    installation.forget_containerd()
    assert installation.files() - installation.files_before == set()
    assert installation.files_before - installation.files() == set()
    assert not machine.is_so("systemctl cat ociregistry")
    assert "ociregistry" not in machine.says("twistd3 --help")
