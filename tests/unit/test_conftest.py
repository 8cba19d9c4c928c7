"""A failure that is only logged fails the test, and tests do not use the machine's proxies."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.processes import ROOT, run

TESTS = """
import os

import pytest
from twisted.internet.defer import fail
from twisted.logger import Logger

log = Logger()


def test_clean():
    log.error("this is no failure")


def log_failure():
    try:
        raise ValueError("first")
    except ValueError:
        log.failure("caught")


def test_logged():
    log_failure()


def test_unhandled():
    fail(ValueError("second"))


def test_no_proxy():
    assert [name for name in os.environ if name.lower().endswith("_proxy")] == []


@pytest.mark.expect_logged_failures
def test_expected():
    log_failure()
"""


def test_logged_failures_and_unhandled_deferreds_fail_a_test(tmp_path: Path) -> None:
    (tmp_path / "test_log.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text("from tests.conftest import no_logged_failures\n")
    # Plugins that are not needed and slow to import.
    without = [f"-pno:{plugin}" for plugin in ("cacheprovider", "hypothesispytest", "twisted")]
    options = ["-c", f"{ROOT}/pyproject.toml", *without]
    proxies = dict.fromkeys(("HTTP_PROXY", "https_proxy", "no_proxy"), "http://127.0.0.1:1")
    done = run([sys.executable, "-m", "pytest", *options, str(tmp_path)], check=False, environment=proxies)
    assert "5 passed, 2 errors" in done.stdout
    for text in ("test_logged", "ValueError: first", "test_unhandled", "ValueError: second"):
        assert text in done.stdout
