"""The container image: which files of a Debian it keeps, how they are dated, and its bill of materials."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ociregistry import __version__
from tools.image import archive, spdx
from tools.image.__main__ import DESCRIPTION, main
from tools.image.files import PLUGINS, STATUS, STORE, File, Root, dated, divided, status
from tools.image.packages import installed, required

ROOT = Path(__file__).resolve().parents[2]
OURS = "usr/lib/python3/dist-packages/ociregistry"
DATE = 1_700_000_000
STATUS_TEXT = """\
Package: ociregistry
Status: install ok installed
Maintainer: The maintainers <maintainers@ociregistry.example>
Architecture: all
Version: 1:2.0+x
Depends: python3 (>= 3.11), sysusers | systemd,
Description: a text
 with another line

Package: python3
Status: install ok installed
Maintainer: Python <python@debian.example>
Architecture: amd64
Version: 3.11
Pre-Depends: libc (>= 2)
Depends: dpkg (>= 1)

Package: libc6
Status: install ok installed
Maintainer: Libc <libc@debian.example>
Architecture: amd64
Version: 2.36
Provides: libc (= 2.36)

Package: dpkg
Status: install ok installed
Maintainer: Dpkg <dpkg@debian.example>
Architecture: amd64
Version: 1.21
Depends: tar

Package: sysusers
Status: install ok installed
Maintainer: Systemd <systemd@debian.example>
Architecture: amd64
Version: 252

Package: base-files
Status: install ok installed
Maintainer: Base <base@debian.example>
Architecture: amd64
Version: 12

Package: gone
Status: deinstall ok config-files
Maintainer: Gone <gone@debian.example>
Architecture: amd64
Version: 1
"""
WITHOUT = {"dpkg", "sysusers"}
LISTS = {
    "ociregistry": ("usr", "usr/bin", "usr/bin/ociregistry", OURS, f"{OURS}/core.py", "etc/ociregistry"),
    "python3": (
        "usr/bin/python3",
        "usr/bin/pydoc3",
        "usr/share/man/man1/python3.1.gz",
        "usr/share/doc/python3/copyright",
    ),
    "libc6:amd64": ("lib", "lib/libc.so.6"),
    "dpkg": ("usr/bin/dpkg",),
    "base-files": ("dev", "tmp", "usr", "usr/bin", "etc", "var", "var/lib"),
}
FOLDERS = f"""
dev etc etc/ociregistry var var/lib var/lib/dpkg var/lib/dpkg/info work work/checkout
usr usr/bin usr/lib usr/lib/python3 usr/lib/python3/dist-packages {OURS} {OURS}/__pycache__
usr/lib/python3/dist-packages/twisted usr/lib/python3/dist-packages/twisted/plugins
usr/share usr/share/doc usr/share/doc/python3 usr/share/man usr/share/man/man1
""".split()


def root_archive(*more: tarfile.TarInfo, terms: str = "") -> bytes:
    """Return the files of a Debian as mmdebstrap writes them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:

        def add(
            name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, time: int = DATE
        ) -> None:
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.mode, member.mtime, member.size = kind, mode, time, len(content)
            member.uname = "builder"
            tar.addfile(member, io.BytesIO(content))

        for name in FOLDERS:
            add(name, kind=tarfile.DIRTYPE, mode=0o755, time=DATE + 500)
        add("tmp", kind=tarfile.DIRTYPE, mode=0o1777, time=DATE + 500)
        link = tarfile.TarInfo("./lib")
        link.type, link.linkname = tarfile.SYMTYPE, "usr/lib"
        tar.addfile(link)
        add("usr/lib/libc.so.6", b"libc", mode=0o6755, time=DATE - 10)
        add("usr/bin/ociregistry", b"#!", mode=0o755)
        add(f"{OURS}/core.py", b"pass")
        add(f"{OURS}/__pycache__/core.cpython-311.pyc", b"compiled", time=DATE + 500)
        add(PLUGINS, b"plugins", time=DATE + 500)
        for name in ("python3", "pydoc3", "dpkg"):
            add(f"usr/bin/{name}", name.encode(), mode=0o755, time=DATE - 20)
        add("usr/share/man/man1/python3.1.gz", b"page")
        add("usr/share/doc/python3/copyright", terms.encode(), time=DATE - 20)
        add("etc/passwd", b"root:x:0:0", time=DATE + 500)
        add("etc/resolv.conf", b"the builder's", time=DATE + 500)
        add("etc/debian_version", b"12.1\n")
        add(STATUS, STATUS_TEXT.encode(), time=DATE + 500)
        for name, paths in LISTS.items():
            add(f"var/lib/dpkg/info/{name}.list", "".join(f"/{path}\n" for path in paths).encode(), time=DATE + 500)
        for member in more:
            tar.addfile(member)
    return buffer.getvalue()


@pytest.fixture
def root() -> Iterator[Root]:
    """The files of a Debian."""
    with tarfile.open(fileobj=io.BytesIO(root_archive())) as tar:
        yield Root(tar)


def kept(root: Root) -> dict[str, File]:
    return root.kept(required(installed(root.text(STATUS)), ["ociregistry", "base-files"], WITHOUT))


def test_required_packages_are_those_of_the_run_time() -> None:
    packages = installed(STATUS_TEXT)
    assert "gone" not in packages
    assert list(required(packages, ["ociregistry"], WITHOUT)) == ["libc6", "ociregistry", "python3"]
    assert packages["ociregistry"].version == "1:2.0+x"
    with pytest.raises(ValueError, match=r"^dpkg depends on tar, which is not installed$"):
        required(packages, ["python3"], [])
    with pytest.raises(ValueError, match=r"^the package gone is not installed$"):
        required(packages, ["gone"], [])


def test_status_lists_what_is_kept() -> None:
    packages = installed(STATUS_TEXT)
    again = installed(status(required(packages, ["ociregistry"], WITHOUT)).decode())
    assert list(again) == ["libc6", "ociregistry", "python3"]
    assert again["ociregistry"] == packages["ociregistry"]


def test_files_of_packages_that_are_not_required_are_left_out(root: Root) -> None:
    files = kept(root)
    paths = {path for path, file in files.items() if not file.is_folder}
    assert {"usr/bin/python3", "usr/lib/libc.so.6", "lib", "etc/passwd", "usr/share/doc/python3/copyright"} <= paths
    assert f"{OURS}/__pycache__/core.cpython-311.pyc" in paths
    assert not {"usr/bin/dpkg", "usr/bin/pydoc3", "etc/resolv.conf", "usr/share/man/man1/python3.1.gz"} & paths
    folders = set(files) - paths
    assert {"dev", "tmp", "var/lib", OURS} <= folders
    assert not {"work", "usr/share/man"} & folders


def test_modes_have_no_setuid(root: Root) -> None:
    files = kept(root)
    assert files["usr/lib/libc.so.6"].mode == 0o755
    assert files["tmp"].mode == 0o1777


def test_devices_are_refused() -> None:
    device = tarfile.TarInfo("./etc/passwd")
    device.type = tarfile.CHRTYPE
    refused = pytest.raises(ValueError, match=r"^etc/passwd is neither a file nor a folder nor a symbolic link$")
    with tarfile.open(fileobj=io.BytesIO(root_archive(device))) as tar, refused:
        kept(Root(tar))


def test_dates_are_those_of_the_packages(root: Root) -> None:
    """What the installation made is a second newer, so that Twisted takes its list of plugins for current."""
    files = {file.path: file for file in dated(kept(root).values())}
    assert files["usr/bin/python3"].time == DATE - 20
    assert files[f"{OURS}/core.py"].time == DATE
    assert {files[path].time for path in (PLUGINS, "etc/passwd", "usr", "lib")} == {DATE + 1}


def test_our_layer_has_what_changes_with_our_package(root: Root) -> None:
    files = kept(root)
    files |= {
        path: File(path, kind, 0o755, 0, 0) for path, kind in ((STATUS, tarfile.REGTYPE), (STORE, tarfile.DIRTYPE))
    }
    own = root.owned(installed(STATUS_TEXT)["ociregistry"])
    ours, others = ({file.path for file in part} for part in divided(files, own))
    assert not ours & others
    assert ours | others == set(files)
    assert {STATUS, STORE, PLUGINS, OURS, f"{OURS}/core.py", f"{OURS}/__pycache__/core.cpython-311.pyc"} <= ours
    assert {"var/lib/dpkg/info/ociregistry.list", "usr/bin/ociregistry"} <= ours
    assert {"usr", "usr/bin", "usr/bin/python3", "lib", "var/lib", "var/lib/dpkg/info/python3.list"} <= others


def test_layer_does_not_depend_on_the_order_of_files() -> None:
    files = [
        File("a", tarfile.DIRTYPE, 0o755, 0, 0, DATE),
        File("a/b", tarfile.REGTYPE, 0o644, 1, 2, DATE, b"content"),
    ]
    assert archive.layer(files, "") == archive.layer(reversed(files), "")


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("Format: x\n\nFiles: *\nCopyright: someone\n  and another\nLicense: Expat\n text\n", "MIT"),
        ("Files: debian/*\nLicense: GPL-3+\n\nFiles: *\nLicense: Apache-2.0\n", "Apache-2.0"),
        ("Files: *\nCopyright: someone\n\nFiles: a\nLicense: Expat\n", "NOASSERTION"),
        ("Files: *\nLicense: GPL-2 or Artistic\n", "NOASSERTION"),
        ("Free text: MIT", "NOASSERTION"),
        ("", "NOASSERTION"),
    ],
)
def test_licences(terms: str, expected: str) -> None:
    assert spdx.licence(terms) == expected


def test_program_writes_the_image_and_its_bill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.image.__main__.PACKAGES", ("ociregistry", "base-files"))
    monkeypatch.setattr("tools.image.__main__.INSTALLERS", WITHOUT)
    (tmp_path / "root.tar").write_bytes(root_archive(terms="Files: *\nLicense: Expat\n"))
    arguments = [str(tmp_path / "root.tar"), str(tmp_path), "--architecture", "arm64", "--date", str(DATE)]
    main([*arguments, "--revision", "abc"])
    path = tmp_path / f"ociregistry-{__version__}-arm64.oci.tar"
    first = path.read_bytes()
    main(arguments)
    assert path.read_bytes() != first
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert {member.mtime for member in tar} == {DATE}
        index = json.load(tar.extractfile("index.json") or io.BytesIO())
        (descriptor,) = index["manifests"]
        name = descriptor["digest"].replace(":", "/")
        manifest = json.load(tar.extractfile(f"blobs/{name}") or io.BytesIO())
    assert descriptor["platform"] == {"architecture": "arm64", "os": "linux"}
    assert manifest["annotations"]["org.opencontainers.image.revision"] == "abc"
    assert manifest["annotations"]["org.opencontainers.image.created"] == "2023-11-14T22:13:20Z"
    bill = json.loads((tmp_path / f"ociregistry-{__version__}-arm64.spdx.json").read_text())
    packages = {package["SPDXID"]: package for package in bill["packages"]}
    python = packages["SPDXRef-Package-python3"]
    assert python["licenseDeclared"] == "MIT"
    assert python["supplier"] == "Organization: Python (python@debian.example)"
    assert python["externalRefs"][0]["referenceLocator"] == "pkg:deb/debian/python3@3.11?arch=amd64&distro=debian-12"
    assert "@1%3A2.0%2Bx?" in packages["SPDXRef-Package-ociregistry"]["externalRefs"][0]["referenceLocator"]


def test_containerfile_has_our_version_and_description() -> None:
    text = (ROOT / "Containerfile").read_text()
    assert re.findall(r"^ARG VERSION=(.+)$", text, re.MULTILINE) == [__version__]
    assert f":{__version__} .\n" in text
    assert f'description="{DESCRIPTION}"' in text
