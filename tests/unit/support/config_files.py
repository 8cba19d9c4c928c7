"""Configuration files: parsed, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociregistry.config.file import Config, read_config
from ociregistry.config.files import ConfigFiles
from ociregistry.config.nodes import ConfigInvalid

OPTIONS = {"port", "log_level", "image_path"}


def read(path: Path, text: str) -> Config:
    """Return the configuration in a file with this text."""
    path.write_text(text, "utf-8")
    return read_config(path, OPTIONS, ConfigFiles())


def refusal(path: Path, text: str) -> str:
    """Return the one-line error for a file with this text."""
    with pytest.raises(ConfigInvalid) as refused:
        read(path, text)
    assert "\n" not in str(refused.value)
    return str(refused.value)
