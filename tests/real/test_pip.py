"""Installed by pip into a virtual environment, from the source and as a wheel: twistd finds the daemon."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from ociregistry import __version__
from tests.processes import ROOT, Server, answers, free_port, run

# The checkout's own code must not be found, by the environment or in the working folder, where twistd looks.
_ELSEWHERE = ("env", "--unset", "PYTHONPATH", "--chdir", "/")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an installation needs, where a build may leave files."""
    source = tmp_path_factory.mktemp("source")
    for name in ("ociregistry", "twisted"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "dropin.cache"))
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with nothing but pip."""
    environment = Environment(tmp_path_factory.mktemp("environment"))
    run([sys.executable, "-m", "venv", str(environment.folder)])
    return environment


class Environment:
    """A virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def argv(self, program: str, *arguments: str) -> list[str]:
        """Return the command line of a program in it."""
        return [*_ELSEWHERE, str(self.folder / "bin" / program), *arguments]

    def run(self, program: str, *arguments: str) -> str:
        """Return the output of a program in it."""
        return run(self.argv(program, *arguments), timeout=300).stdout

    def plugins(self) -> frozenset[str]:
        """The files in Twisted's folder of plugins, except generated ones."""
        (folder,) = self.folder.glob("lib/python3*/site-packages/twisted/plugins")
        return frozenset(path.name for path in folder.glob("*.py"))


class Installed(Server):
    """The daemon of an environment."""

    def __init__(self, environment: Environment, folder: Path) -> None:
        self._port, admin = free_port(), free_port()
        self.page = f"http://127.0.0.1:{admin}/"
        options = ["--image-path", str(folder / "store"), "--listen", f"tcp:{self._port}:interface=127.0.0.1"]
        options += ["--admin-listen", f"tcp:{admin}:interface=127.0.0.1"]
        super().__init__(environment.argv("twistd", "-n", "--pidfile=", "ociregistry", *options), folder / "log")

    def ready(self) -> bool:
        """Whether it answers."""
        return answers(f"http://127.0.0.1:{self._port}/v2/")


@pytest.mark.parametrize("kind", ["source", "wheel"])
def test_pip_installation_works_and_uninstalls_cleanly(
    environment: Environment, source: Path, tmp_path: Path, kind: str
) -> None:
    what = source
    if kind == "wheel":
        environment.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source))
        (what,) = tmp_path.glob("ociregistry-*.whl")
    environment.run("pip", "install", "--quiet", str(what))
    assert "ociregistry" in environment.run("twistd", "--help")
    assert environment.run("twistd", "ociregistry", "--version") == f"ociregistry {__version__}\n"
    assert environment.run("ociregistry", "--version") == f"ociregistry {__version__}\n"
    assert environment.run("ociregistry", "check", "--default-ns", "quay.io") == environment.run(
        "twistd", "ociregistry", "check", "--default-ns", "quay.io"
    )
    with Installed(environment, tmp_path) as daemon:
        assert all(answers(f"{daemon.page}{path}") for path in ("", "page.css", "page.js", "icon.svg"))
    plugins = environment.plugins()
    assert {"__init__.py", "ociregistry_plugin.py"} <= plugins
    environment.run("pip", "uninstall", "--quiet", "--yes", "ociregistry")
    assert environment.plugins() == plugins - {"ociregistry_plugin.py"}
    assert "ociregistry" not in environment.run("twistd", "--help")
    assert list((environment.folder / "bin").glob("ociregistry*")) == []
    with pytest.raises(RuntimeError, match="Unknown command: ociregistry"):
        environment.run("twistd", "ociregistry", "--version")
