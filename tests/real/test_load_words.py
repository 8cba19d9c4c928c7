"""`load` takes files, names of images, and the standard input."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import make_image
from tests.real.shells import Ended, Shell, assert_one_line, blobs_in, digests, run_process, shell_in, succeeded
from tests.unit.support.archives import named, write_tar
from tests.upstream import ScriptedRegistry

IMAGE, OTHER = make_image("words"), make_image("words/other")
PATIENCE = 120.0


@pytest.fixture
def shell(upstream: ScriptedRegistry, tmp_path: Path) -> Shell:
    """An empty store, and an upstream with two images."""
    upstream.add("team/app", IMAGE, "v1")
    upstream.add("team/app", OTHER, "v2")
    return shell_in(tmp_path, [{"name": upstream.host, "scheme": "http"}])


def fed(shell: Shell, script: str) -> Ended:
    """Run `load -` in a shell, where `script` says what its standard input is; "$@" is the command."""
    return run_process(["bash", "-c", script, "bash", *shell.argv("load", "-")], shell.folder)


def test_names_of_images_are_loaded(upstream: ScriptedRegistry, shell: Shell) -> None:
    (shell.folder / "list").write_text(f"{upstream.host}/team/app:v2\n")
    done = succeeded(shell.run("load", f"{upstream.host}/team/app@{IMAGE.manifest.digest}", "list"))
    assert done.splitlines()[-1] == "2 loaded, 0 already there, 0 failed"
    assert blobs_in(shell.store) == digests(IMAGE, OTHER)


def test_file_with_the_name_of_an_image_is_the_file(upstream: ScriptedRegistry, shell: Shell) -> None:
    (shell.folder / "app:v1").write_text(f"{upstream.host}/team/app:v2\n")
    succeeded(shell.run("load", "app:v1"))
    assert blobs_in(shell.store) == digests(OTHER)


@pytest.mark.parametrize("script", ['echo IMAGE | "$@"', '"$@" <<< IMAGE'])
def test_list_is_read_from_standard_input(upstream: ScriptedRegistry, shell: Shell, script: str) -> None:
    done = fed(shell, script.replace("IMAGE", f"{upstream.host}/team/app:v1"))
    assert succeeded(done).splitlines()[-1] == "1 loaded, 0 already there, 0 failed"
    assert blobs_in(shell.store) == digests(IMAGE)


def test_archive_is_read_from_redirected_standard_input_and_not_from_a_pipe(shell: Shell) -> None:
    write_tar(shell.folder / "a.tar", named(IMAGE), "gz")
    assert_one_line(
        fed(shell, 'cat a.tar | "$@"'), 2, "/dev/stdin: is neither a text file nor an image archive, which"
    )
    assert not shell.store.exists()
    done = succeeded(fed(shell, '"$@" < a.tar'))
    assert done.splitlines()[-1] == "1 loaded, 0 already there, 0 failed"


def test_closed_standard_input_is_one_line(shell: Shell) -> None:
    done = fed(shell, '"$@" <&-')
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
