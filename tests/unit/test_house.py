"""Module structure: imports point downward, network and disk code are separate, files stay below the size cap."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = "ociregistry"
LONGEST = 550

# Top layer first: a part may import itself and any part in a lower layer, but not its neighbours.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"tap", "script"}),
    frozenset({"daemon", "commands"}),
    frozenset({"composition"}),
    frozenset({"web"}),
    frozenset({"admin"}),
    frozenset({"archives"}),
    frozenset({"pullthrough"}),
    frozenset({"upstream", "store"}),
    frozenset({"settings"}),
    frozenset({"config", "imagelists"}),
    frozenset({"platforms"}),
    frozenset({"manifests"}),
    frozenset({"names"}),
    frozenset({"concurrency", "context", "log", "openssl", "process", "strictjson", "systemd"}),
    # __init__ is the package itself, with its __version__. Neither of these imports another module of ours.
    frozenset({"errors", "__init__"}),
)
HEIGHT = {part: -layer for layer, parts in enumerate(LAYERS) for part in parts}

# Modules that only some parts may import. The reactor is global state: all others receive a clock and an agent.
ONLY: dict[str, frozenset[str]] = {
    "twisted.internet.reactor": frozenset({"tap", "commands"}),
    "twisted.web": frozenset({"web", "upstream"}),
    "treq": frozenset({"upstream"}),
    "prometheus_client": frozenset({"admin"}),
    "ociregistry.archives": frozenset({"archives", "commands"}),
}
# Calls that import by name; a name that is not a literal cannot be checked.
IMPORTERS = frozenset({"__import__", "import_module", "namedAny", "namedModule", "namedObject"})

Sources = Mapping[str, str]


def part_of(module: str) -> str:
    """Return the package or top-level module that a module is in: `web` for ociregistry.web.blobs."""
    return f"{module}.__init__".split(".")[1]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported(module: str, source: str) -> Iterator[str]:
    """Return every name that `module` imports, anywhere in its source; `from a.b import c` counts as `a.b.c`.

    A package's own module is called `package.__init__`, so that relative imports start from the same place.
    """
    for node in ast.walk(ast.parse(source, module)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                above = module.split(".")[:-level] if level else []
                yield from (".".join(filter(None, [*above, base, alias.name])) for alias in names)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if name in IMPORTERS:
                match args:
                    case [ast.Constant(value=str(target)), *_]:
                        yield target
                    case _:
                        yield "?"


def faults(sources: Sources) -> list[str]:
    """Return one line for each violation; `sources` is {module name: source text}."""
    return sorted({fault for module, source in sources.items() for fault in _faults(module, source)})


def _faults(module: str, source: str) -> Iterator[str]:
    here = part_of(module)
    if here not in HEIGHT:
        yield f"{module}: {here} is in no layer"
        return
    if (lines := len(source.splitlines())) > LONGEST:
        yield f"{module}: {lines} lines, more than {LONGEST}"
    for target in imported(module, source):
        if target == "?":
            yield f"{module}: imports something whose name is not written out"
        if within(target, OURS):
            there = part_of(target)
            if there not in HEIGHT:
                # `from ociregistry import __version__` imports a name of the package, not a module.
                there = "__init__"
            if there != here and HEIGHT[there] >= HEIGHT[here]:
                yield f"{module}: {here} must not import {there}"
        for package, parts in ONLY.items():
            if within(target, package) and here not in parts:
                yield f"{module}: {here} must not import {package}"
        if target.endswith(".*"):
            yield f"{module}: imports everything from {target.removesuffix('.*')}"


def sources_of(root: Path) -> dict[str, str]:
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted((root / OURS).rglob("*.py"))
    }


def test_package_structure() -> None:
    sources = sources_of(ROOT)
    assert "ociregistry.__init__" in sources, "nothing was read"
    assert faults(sources) == []


def cycles(sources: Sources) -> list[str]:
    """Return each module that is part of an import cycle, with the cycle."""
    graph = {
        module: sorted({target for name in imported(module, source) if (target := _module(name, sources))})
        for module, source in sources.items()
    }
    found: list[str] = []
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            found.append(" -> ".join((*way[way.index(module) :], module)))
        elif module not in done:
            for target in graph[module]:
                follow(target, (*way, module))
            done.add(module)

    for module in graph:
        follow(module, ())
    return found


def _module(name: str, sources: Sources) -> str | None:
    """Return our module that an imported name is in; packages do not count."""
    return next(
        (one for one in (name, name.rpartition(".")[0]) if one in sources and not one.endswith(".__init__")), None
    )


def test_no_import_cycles() -> None:
    assert cycles(sources_of(ROOT)) == []


def test_import_cycle_is_detected() -> None:
    sources = {"ociregistry.a": "from ociregistry.b import x", "ociregistry.b": "import ociregistry.c"}
    assert cycles({**sources, "ociregistry.c": "x = 1"}) == []
    assert cycles({**sources, "ociregistry.c": "from ociregistry.a import y"}) == [
        "ociregistry.a -> ociregistry.b -> ociregistry.c -> ociregistry.a"
    ]


STORE_NAMES = frozenset(
    {"blobs", "fat", "img", "pulls", "lock", "bad", "socket", "verified", ".staged", ".note", ".wish"}
)
"""Names of folders and files in the store, which only the module `paths` spells."""
SPELLED_ELSEWHERE = {
    # The folder of an OCI layout.
    "archives/layout.py": {"blobs"},
    # The path of the API.
    "upstream/client.py": {"blobs"},
    "admin/requests.py": {"blobs"},
    # A key of the status.
    "admin/terminal.py": {"blobs"},
}
"""Where such a word means something else."""


def test_only_paths_spells_the_names_of_the_store() -> None:
    for path in sorted((ROOT / OURS).rglob("*.py")):
        name = path.relative_to(ROOT / OURS).as_posix()
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        spelled = STORE_NAMES & {constant for constant in constants if isinstance(constant, str)}
        assert spelled == (STORE_NAMES if name == "store/paths.py" else SPELLED_ELSEWHERE.get(name, set())), name


OLD_NAMES = frozenset({"Chain", "DaemonBeside", "Link", "OtherBlob", "Precedence", "Slots", "precedence", "use"})
"""Former names that consist of words which other names may contain."""
# fmt: off
OLD_WORDS = frozenset({
    "aside", "bell", "came", "catalogue", "circle", "doomed", "door", "flights", "inventory", "manner",
    "promises", "proof", "supplier", "surplus", "untold", "unwish", "upkeep", "wish", "wished", "wishes",
})
# fmt: on
"""Words of former names, each replaced by another word; no name contains them."""


def identifiers(path: Path) -> Iterator[str]:
    """Yield the names in a file, and the name of the file."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        names = (getattr(node, key, None) for key in ("id", "attr", "name", "arg", "asname"))
        yield from (name for name in names if isinstance(name, str))


def words_of(name: str) -> list[str]:
    """Return the words of a name, in lower case: `["single", "flight"]` for `_SingleFlight` and `single_flight`."""
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def test_no_identifier_has_an_old_name() -> None:
    for folder in (OURS, "tests", "bench", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in identifiers(path):
                assert name.lstrip("_") not in OLD_NAMES, path
                assert OLD_WORDS.isdisjoint(words_of(name)), (path, name)


def test_plugin_folder_is_no_package() -> None:
    assert list((ROOT / "twisted").rglob("__init__.py")) == []


# The modules in the first column, here and below, lack the prefix `ociregistry.`.
ALLOWED = [
    ("tap", "from twisted.internet import reactor"),
    ("tap", "import ociregistry.commands.load, ociregistry.web.site"),
    ("tap", "from ociregistry import __version__, settings"),
    ("tap", "from ociregistry.daemon import Daemon"),
    ("daemon", "from ociregistry.web.channel import ServerPolicy\nfrom ociregistry.settings import Settings"),
    ("daemon", "from ociregistry.store.store import Store\nfrom ociregistry.upstream.network import Network"),
    ("commands.check", "from ociregistry.upstream.network import is_allowed"),
    ("web.api", "from ociregistry.context import Via"),
    ("web.hits", "from ociregistry.admin.requests import Tally"),
    ("admin.status", "from ociregistry.pullthrough.cache import PullThrough"),
    ("upstream.tls", "from ociregistry.config.tls import UpstreamTls"),
    ("config.file", "from ociregistry.config.nodes import Node\nfrom .tls import ServerTls"),
    ("config.registries", "from ociregistry.names import Upstream"),
    ("commands.load", "def run():\n    from twisted.internet import reactor"),
    ("web.blobs", "from twisted.web.resource import Resource"),
    ("web.blobs", "from . import site\nfrom ..names import Digest"),
    ("web.__init__", "from .site import Site"),
    ("pullthrough.download", "from ociregistry import store, upstream"),
    ("upstream.registry", "import treq\nfrom twisted.web.client import Agent"),
    ("upstream.registry", "from twisted.internet import defer, interfaces"),
    ("store.blobs", "import os\nfrom ociregistry.names import Digest"),
    ("settings", "from ociregistry.manifests import Platform"),
    ("names", "from ociregistry.errors import RegistryError"),
    ("errors", "import treqlike, twisted.website"),
]


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_downward_import_is_allowed(module: str, source: str) -> None:
    assert faults({f"{OURS}.{module}": source}) == []


FORBIDDEN = [
    ("errors", "from ociregistry.names import Digest", "errors must not import names"),
    ("errors", "from . import __version__", "errors must not import __init__"),
    ("__init__", "from ociregistry.errors import RegistryError", "__init__ must not import errors"),
    ("names", "import ociregistry.manifests", "names must not import manifests"),
    ("names", "from .manifests import Manifest", "names must not import manifests"),
    ("manifests", "from ociregistry import settings as s", "manifests must not import settings"),
    ("settings", "from ociregistry.tap import Options", "settings must not import tap"),
    ("daemon", "from ociregistry.tap import Options", "daemon must not import tap"),
    ("daemon", "from twisted.internet import reactor", "daemon must not import twisted.internet.reactor"),
    ("daemon", "from twisted.web.server import Site", "daemon must not import twisted.web"),
    ("commands.check", "from ociregistry.daemon import exit_with", "commands must not import daemon"),
    ("web.tls", "from ociregistry import daemon", "web must not import daemon"),
    ("config.file", "from ociregistry.settings import OPTIONS", "config must not import settings"),
    ("config.tls", "import ociregistry.upstream.tls", "config must not import upstream"),
    ("names", "from ociregistry.config import nodes", "names must not import config"),
    ("context", "from ociregistry.names import Upstream", "context must not import names"),
    ("context", "from . import log", "context must not import log"),
    ("store.blobs", "import ociregistry.upstream.auth", "store must not import upstream"),
    ("store.blobs", "import ociregistry.pullthrough", "store must not import pullthrough"),
    ("upstream.__init__", "from ..store import blobs", "upstream must not import store"),
    ("upstream.auth", "from .. import store", "upstream must not import store"),
    ("web.site", "import ociregistry.commands.load", "web must not import commands"),
    ("admin.status", "from ociregistry.web.site import RegistrySite", "admin must not import web"),
    ("pullthrough.a", "from ociregistry.admin import requests", "pullthrough must not import admin"),
    ("web.a", "import prometheus_client", "web must not import prometheus_client"),
    ("web.a", "from ociregistry.archives import layout", "web must not import ociregistry.archives"),
    ("commands.load", "from ociregistry.tap import Options", "commands must not import tap"),
    ("store.a", "if TYPE_CHECKING:\n    import ociregistry.web", "store must not import web"),
    ("store.a", "def f():\n    import ociregistry.web.b as c", "store must not import web"),
    ("store.a", "importlib.import_module('ociregistry.web')", "store must not import web"),
    ("store.a", "import_module(name)", "imports something whose name is not written out"),
    ("store.a", "from os.path import *", "imports everything from os.path"),
    ("helpers", "", "helpers is in no layer"),
    ("web.site", "x = 1\n" * (LONGEST + 1), "551 lines, more than 550"),
    ("web.site", "from twisted.internet import reactor", "web must not import twisted.internet.reactor"),
    ("store.a", "import twisted.internet.reactor as r", "store must not import twisted.internet.reactor"),
    (
        "upstream.a",
        "async def f():\n    from twisted.internet import defer, reactor as r",
        "upstream must not import twisted.internet.reactor",
    ),
    ("pullthrough.a", "from twisted.web.http import Request", "pullthrough must not import twisted.web"),
    ("settings", "from twisted import web", "settings must not import twisted.web"),
    ("commands.load", "import twisted.web", "commands must not import twisted.web"),
    ("web.site", "from treq.client import HTTPClient", "web must not import treq"),
    ("tap", "import treq", "tap must not import treq"),
]


@pytest.mark.parametrize(("module", "source", "fault"), FORBIDDEN)
def test_violation_is_detected(module: str, source: str, fault: str) -> None:
    assert faults({f"{OURS}.{module}": source}) == [f"{OURS}.{module}: {fault}"]


def test_sources_are_read_from_folder(tmp_path: Path) -> None:
    (tmp_path / OURS / "store").mkdir(parents=True)
    (tmp_path / OURS / "store" / "__init__.py").write_text("from ..web import site\n")
    assert faults(sources_of(tmp_path)) == ["ociregistry.store.__init__: store must not import web"]


PUT_TOGETHER = frozenset({"Store", "Network", "Registries", "PullThrough", "Listings"})


def test_daemon_and_commands_are_put_together_by_one_function() -> None:
    made = {
        (node.func.id, path.name)
        for path in sorted((ROOT / OURS).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PUT_TOGETHER
    }
    assert made == {(name, "composition.py") for name in PUT_TOGETHER}


def test_loggers_have_the_namespace_of_their_part() -> None:
    """As an attribute of a class, a Logger would have the name of the class instead."""
    made = 0
    for module, source in sources_of(ROOT).items():
        folder = module.removeprefix(f"{OURS}.").rpartition(".")[0].partition(".")[0]
        namespace = f"{OURS}.{folder}" if folder else OURS
        tree = ast.parse(source)
        allowed = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Logger"]
        made += len(calls)
        assert len(calls) <= 1, module
        assert not calls or f"_log = Logger(namespace='{namespace}')" in allowed, module
    assert made > 10
