"""What is in the image, and what is not."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ociregistry import __version__
from tests.image.layout import Layout
from tests.processes import ROOT, run

_NAME = f"localhost/ociregistry:{__version__}"
_LARGEST = 150_000_000
_PREFIX = "org.opencontainers.image."


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*"):
        yield str(path.relative_to(root)), path


def _resolved(root: Path, path: Path) -> Path:
    """Return what a link leads to when `root` is the root."""
    for _ in range(40):
        if not path.is_symlink():
            return path
        target = path.readlink()
        path = root / str(target).lstrip("/") if target.is_absolute() else path.parent / target
    raise AssertionError(f"{path} leads in a circle")


def test_configuration(layout: Layout) -> None:
    config = layout.config["config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["/usr/bin/ociregistry"]
    assert "Cmd" not in config
    assert config["Volumes"] == {"/var/lib/ociregistry": {}}
    assert set(config["ExposedPorts"]) == {"8080/tcp", "8081/tcp"}
    assert config["StopSignal"] == "SIGTERM"
    assert layout.config["os"] == "linux"


def test_labels_are_annotations_too(layout: Layout) -> None:
    labels = layout.config["config"]["Labels"]
    assert layout.manifest["annotations"] == labels
    commit = run(["git", "-C", str(ROOT), "log", "-1", "--format=%H %cI"]).stdout.split()[0]
    assert labels[f"{_PREFIX}title"] == "ociregistry"
    assert labels[f"{_PREFIX}version"] == __version__
    assert labels[f"{_PREFIX}licenses"] == "Apache-2.0"
    assert labels[f"{_PREFIX}description"]
    # Left out when files were changed after the commit.
    assert labels.get(f"{_PREFIX}revision", commit) == commit
    assert labels[f"{_PREFIX}created"] == layout.config["created"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", layout.config["created"])


def test_archive_names_the_image_for_containerd_and_podman(layout: Layout) -> None:
    (descriptor,) = layout.index["manifests"]
    assert descriptor["annotations"] == {
        "io.containerd.image.name": _NAME,
        "org.opencontainers.image.ref.name": _NAME,
    }
    assert descriptor["platform"] == {"architecture": layout.config["architecture"], "os": "linux"}
    assert layout.names == sorted(layout.names)


def test_layers_hold_no_traces_of_the_build(layout: Layout) -> None:
    """Sorted, without names of users, without devices, and no layer has a file of another one."""
    seen: set[str] = set()
    for layer in layout.layers:
        members = layer.getmembers()
        names = [member.name for member in members]
        assert names == sorted(names)
        assert not seen & set(names)
        seen.update(names)
        assert {(member.uname, member.gname) for member in members} == {("", "")}
        assert all(member.isreg() or member.isdir() or member.issym() for member in members)


def test_our_package_has_a_layer_of_its_own(layout: Layout) -> None:
    """An upgrade to our next version fetches a small layer only."""
    debian, ours = (each["size"] for each in layout.manifest["layers"])
    assert ours < 2_000_000 < debian


def test_size(root: Path) -> None:
    assert sum(path.lstat().st_size for _, path in _files(root)) < _LARGEST


def test_nothing_is_setuid_or_writable_for_all(root: Path) -> None:
    modes = {name: path.lstat().st_mode for name, path in _files(root) if not path.is_symlink()}
    assert not {name for name, mode in modes.items() if mode & (stat.S_ISUID | stat.S_ISGID)}
    assert {name for name, mode in modes.items() if mode & stat.S_IWOTH} <= {"tmp", "var/tmp"}


def test_only_the_store_belongs_to_the_user(root: Path) -> None:
    owners = {name: (path.lstat().st_uid, path.lstat().st_gid) for name, path in _files(root)}
    assert {name for name, owner in owners.items() if owner != (0, 0)} == {
        "etc/ociregistry/ociregistry.yaml",  # readable for its group
        "var/lib/ociregistry",
    }
    assert owners["var/lib/ociregistry"] == (65532, 65532)
    assert "ociregistry:x:65532:65532:" in (root / "etc/passwd").read_text()
    assert "ociregistry:x:65532:" in (root / "etc/group").read_text()


def test_programs(root: Path) -> None:
    """No shell, no compiler, no package manager: the interpreter and the daemon."""
    programs = {path.name for folder in ("usr/bin", "usr/sbin") for path in (root / folder).iterdir()}
    assert {re.sub(r"^python3\.\d+$", "python3", program) for program in programs} == {"ociregistry", "python3"}


@pytest.mark.parametrize(
    "pattern",
    [
        r"usr/share/(man|info|locale)/.+",
        r"usr/share/doc/[^/]+/(?!copyright$).+",
        r"var/(cache|lib/apt|log)/.+",
        r"dev/.+",
        r".*\.(deb|a|h)",
        r"etc/(shadow|gshadow|resolv\.conf|hostname|machine-id).*",
        r"(etc|usr/lib|usr/share|var/lib)/(apt|debconf|gcc|perl|perl5)(/.*)?",
    ],
)
def test_surprises_are_absent(root: Path, pattern: str) -> None:
    assert [name for name, _ in _files(root) if re.fullmatch(pattern, name)] == []


def test_links_lead_somewhere(root: Path) -> None:
    links = [path for _, path in _files(root) if path.is_symlink()]
    assert links
    # Of the runtime, which mounts them.
    assert [str(link) for link in links if not _resolved(root, link).exists()] == []


def test_modules_are_compiled(root: Path) -> None:
    """A read-only root cannot keep compiled modules; those here are valid whatever the dates of their sources."""
    package = root / "usr/lib/python3/dist-packages/ociregistry"
    for source in package.rglob("*.py"):
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")
        # PEP 552: hash-based, and not compared with the source.
        assert int.from_bytes(compiled.read_bytes()[4:8], "little") == 0b01


def test_scanners_find_the_packages(root: Path, bill: Path) -> None:
    status = (root / "var/lib/dpkg/status").read_text()
    names = set(re.findall(r"^Package: (.+)$", status, re.MULTILINE))
    assert {"ociregistry", "python3-twisted", "libssl3", "ca-certificates", "tzdata"} <= names
    assert not {"dpkg", "apt", "bash", "dash", "perl-base", "coreutils"} & names
    for name in names:
        assert (root / "usr/share/doc" / name).exists(), f"{name} has no copyright file"
    listed = {package["name"]: package for package in json.loads(bill.read_text())["packages"]}
    assert set(listed) == names


def test_bill_of_materials(layout: Layout, bill: Path) -> None:
    """What the schema of SPDX 2.3 requires, and package URLs."""
    document: dict[str, Any] = json.loads(bill.read_text())
    assert document["spdxVersion"] == "SPDX-2.3"
    assert document["dataLicense"] == "CC0-1.0"
    assert document["SPDXID"] == "SPDXRef-DOCUMENT"
    assert document["name"] == f"ociregistry-{__version__}-{layout.config['architecture']}"
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", document["documentNamespace"])
    assert document["creationInfo"]["created"] == layout.config["created"]
    assert all(re.match("(Tool|Organization|Person): ", each) for each in document["creationInfo"]["creators"])
    packages = {package["SPDXID"]: package for package in document["packages"]}
    assert len(packages) == len(document["packages"])
    for identifier, package in packages.items():
        assert re.fullmatch(r"SPDXRef-[A-Za-z0-9.-]+", identifier)
        assert package["name"]
        assert package["versionInfo"]
        assert package["downloadLocation"] == "NOASSERTION"
        assert package["filesAnalyzed"] is False
        (reference,) = package["externalRefs"]
        assert re.match(r"pkg:(deb/debian|oci)/[^ ]+@[^ ]+$", reference["referenceLocator"])
    ours = packages["SPDXRef-Package-ociregistry"]
    assert ours["licenseDeclared"] == "Apache-2.0"
    relations = {(each["relationshipType"], each["relatedSpdxElement"]) for each in document["relationships"]}
    image = "SPDXRef-Image"
    assert relations == {("DESCRIBES", image), *(("CONTAINS", each) for each in packages if each != image)}
    assert layout.digest.partition(":")[2] in packages[image]["externalRefs"][0]["referenceLocator"]
