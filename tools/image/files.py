"""The files of a Debian that the image keeps: those of the packages that the program needs, without documentation."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from tools.image.packages import Package

STATUS = "var/lib/dpkg/status"
STORE = "var/lib/ociregistry"
PLUGINS = "usr/lib/python3/dist-packages/twisted/plugins/dropin.cache"

_INFO = "var/lib/dpkg/info"
_GENERATED = re.compile(
    r"etc/(passwd|group|nsswitch\.conf|localtime|timezone|ssl/certs/.+)"  # by maintainer scripts
    r"|[^/]+"  # /lib and others as links into /usr
    rf"|{re.escape(PLUGINS)}"
)
"""Files of no package that are kept, beside compiled modules."""
_OMITTED = re.compile(
    r"usr/share/(applications|base-files|bash-completion|binfmts|bug|doc-base|info|lintian|locale|man|perl5|pixmaps)/.*"
    r"|usr/share/(python3|readline|zsh)/.*"
    r"|usr/share/doc/[^/]+/(?!copyright$).*"
    r"|usr/(bin|sbin)/(?!(ociregistry|python3|python3\.[0-9]+)$).*|usr/(games|include|local|src)(/.*)?"
    r"|usr/lib/(binfmt\.d|locale|ssl/misc|systemd|sysusers\.d|tmpfiles\.d|valgrind)/.*|usr/lib/ssl/private"
    r"|usr/lib/[^/]+/gconv/.*"  # character sets of iconv, which Python does not use
    r"|etc/(cron\.[a-z]+|default|init\.d|logrotate\.d|profile\.d|skel|update-motd\.d|ca-certificates)/.*"
    r"|dev/.*|var/(backups|cache|local|lock|mail)(/.*)?"
)
"""Files of packages that nothing reads at run time. Copyright files stay, as the licences demand."""
_COMPILED = re.compile(r"(?P<folder>.+)/__pycache__/(?P<module>[^/.]+)\.cpython-[0-9]+\.pyc")


@dataclass(frozen=True, slots=True)
class File:
    """A file, folder or symbolic link of the image.

    `path` is relative to the root; `mode` has the permissions only; `time` is in seconds since 1970, 0 for what the
    installation made; `content` is empty for all but files, and `target` for all but links.
    """

    path: str
    kind: bytes
    mode: int
    uid: int
    gid: int
    time: int = 0
    content: bytes = b""
    target: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.kind == tarfile.DIRTYPE


class Root:
    """The files of an installed Debian, read from its tar archive."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members = {member.name.removeprefix("./"): member for member in archive if member.name != "."}

    def text(self, path: str) -> str:
        """Return the content of a file; empty if it is missing."""
        member = self._members.get(path)
        return self._content(member).decode() if member is not None else ""

    def copyright(self, package: Package) -> str:
        """Return the copyright file of a package; empty if it has none of its own."""
        return self.text(f"usr/share/doc/{package.name}/copyright")

    def owned(self, package: Package) -> set[str]:
        """Return the paths of a package's files and folders, with /lib as a link to /usr/lib, and of dpkg's notes."""
        listing = "".join(self.text(f"{_INFO}/{name}.list") for name in package.files)
        notes = {f"{_INFO}/{name}.{kind}" for name in package.files for kind in ("list", "md5sums")}
        return {self._resolved(line.strip("/")) for line in listing.splitlines()} | notes

    def kept(self, packages: Mapping[str, Package]) -> dict[str, File]:
        """Return the files of the image by path, with the folders that they are in.

        Raises:
            ValueError: a file is of a kind that images do not hold.
        """
        owned = set[str]().union(*map(self.owned, packages.values()))
        standard = self.owned(packages["base-files"])
        files: dict[str, File] = {}
        for path, member in self._members.items():
            if _OMITTED.fullmatch(path) or (member.isdir() and path not in standard):
                continue
            if path in owned or _GENERATED.fullmatch(path) or _source(path) in owned:
                files[path] = self._file(path, member, packaged=path in owned)
        for path in _parents(files):
            files.setdefault(path, self._file(path, self._members[path], packaged=False))
        return files

    def _resolved(self, path: str) -> str:
        first, slash, rest = path.partition("/")
        member = self._members.get(first)
        return f"{member.linkname}{slash}{rest}" if member is not None and member.issym() else path

    def _file(self, path: str, member: tarfile.TarInfo, *, packaged: bool) -> File:
        if not (member.isreg() or member.isdir() or member.issym()):
            raise ValueError(f"{path} is neither a file nor a folder nor a symbolic link")
        # Without the bits of setuid and setgid.
        mode = member.mode & 0o1777
        content = self._content(member) if member.isreg() else b""
        target = member.linkname if member.issym() else ""
        # Folders, some links and dpkg's notes are as old as the installation.
        time = int(member.mtime) if packaged and member.isreg() and not path.startswith(_INFO) else 0
        return File(path, member.type, mode, member.uid, member.gid, time, content, target)

    def _content(self, member: tarfile.TarInfo) -> bytes:
        file = self._archive.extractfile(member)
        return file.read() if file is not None else b""


def status(packages: Mapping[str, Package]) -> bytes:
    """Return dpkg's status with these packages only, for scanners."""
    return "".join(f"{packages[name].paragraph}\n\n" for name in sorted(packages)).encode()


def dated(files: Iterable[File]) -> Iterator[File]:
    """Date what the installation made by the packages, so that a later build gives the same.

    That is a second after the newest file: Twisted ignores its list of plugins unless it is newer than each of them.
    """
    files = list(files)
    made = max((file.time for file in files), default=0) + 1
    for file in files:
        yield replace(file, time=file.time or made)


def divided(files: Mapping[str, File], own: Collection[str]) -> tuple[list[File], list[File]]:
    """Return the files that change with our package, whose files are `own`, and the others."""
    contents = {path for path, file in files.items() if not file.is_folder}
    ours = {path for path in contents if path in {STATUS, PLUGINS} or path in own or _source(path) in own} | {STORE}
    ours |= _parents(ours) - _parents(contents - ours)
    return [files[path] for path in ours], [file for path, file in files.items() if path not in ours]


def _parents(paths: Iterable[str]) -> set[str]:
    """Return the folders that files are in."""
    return {str(parent) for path in paths for parent in PurePosixPath(path).parents} - {"."}


def _source(path: str) -> str:
    """Return the path of the module of a compiled one; empty for other files."""
    compiled = _COMPILED.fullmatch(path)
    return f"{compiled['folder']}/{compiled['module']}.py" if compiled else ""
