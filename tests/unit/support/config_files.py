"""Configuration files of tests: what one says, or why it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociregistry.config.file import Config, read_config
from ociregistry.config.nodes import ConfigInvalid

OPTIONS = {"port", "log_level", "image_path"}


def read(path: Path, text: str) -> Config:
    """What a file with this text says."""
    path.write_text(text, "utf-8")
    return read_config(path, OPTIONS)


def refusal(path: Path, text: str) -> str:
    """What is said of a file with this text, in one line."""
    with pytest.raises(ConfigInvalid) as refused:
        read(path, text)
    assert "\n" not in str(refused.value)
    return str(refused.value)
