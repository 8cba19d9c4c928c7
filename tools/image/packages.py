"""Debian packages as dpkg's status lists them, and which of them a program needs when it runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package.

    `paragraph` is its text in dpkg's status, without the empty line behind it; `fields` are the first lines of its
    fields, by their names.
    """

    paragraph: str
    fields: Mapping[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        """The name, without an architecture."""
        return self.fields["Package"]

    @property
    def version(self) -> str:
        """The version, with epoch and revision."""
        return self.fields["Version"]

    @property
    def architecture(self) -> str:
        """The architecture in Debian's spelling, or all."""
        return self.fields["Architecture"]

    @property
    def files(self) -> tuple[str, str]:
        """The two names under which dpkg may keep the package's files, without their suffix."""
        return self.name, f"{self.name}:{self.architecture}"


def installed(status: str) -> dict[str, Package]:
    """Parse dpkg's status; return the installed packages by name."""
    packages = {}
    for paragraph in filter(None, re.split(r"\n{2,}", status.strip("\n"))):
        lines = (line.partition(":") for line in paragraph.split("\n") if not line.startswith(" "))
        package = Package(paragraph, {name: value.strip() for name, _, value in lines})
        if package.fields["Status"].endswith(" installed"):
            packages[package.name] = package
    return packages


def required(packages: Mapping[str, Package], names: Iterable[str], without: Collection[str]) -> dict[str, Package]:
    """Return the packages `names` with all that they depend on, sorted, except `without` and what only those need.

    Raises:
        ValueError: a package is missing.
    """
    providers = {name: name for name in packages}
    for package in packages.values():
        for name in _words(package.fields.get("Provides", "")):
            providers.setdefault(name, package.name)
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name not in packages:
            raise ValueError(f"the package {name} is not installed")
        found.add(name)
        for alternatives in _dependencies(packages[name]):
            present = [providers[each] for each in alternatives if each in providers]
            if not present:
                raise ValueError(f"{name} depends on {' | '.join(alternatives)}, which is not installed")
            if not any(each in without for each in present):
                waiting.append(present[0])
    return {name: packages[name] for name in sorted(found)}


def _dependencies(package: Package) -> Iterator[list[str]]:
    """Return the names of each dependency's alternatives."""
    for relation in ("Pre-Depends", "Depends"):
        for dependency in filter(None, package.fields.get(relation, "").split(",")):
            yield [word for each in dependency.split("|") for word in _words(each)]


def _words(relations: str) -> Iterator[str]:
    """Return the names in a list of relations, without versions and architectures."""
    for relation in filter(None, relations.split(",")):
        yield re.split(r"[ (:]", relation.strip(), maxsplit=1)[0]
