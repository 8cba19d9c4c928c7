"""The images of the chart are found in what helm renders."""

from __future__ import annotations

import subprocess

import pytest

from ociregistry import __version__
from tests.chart.rendering import render
from tests.chart.values import CASES
from tests.processes import twistd


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("node configurer", f"localhost/ociregistry:{__version__}"),
        ("everything else", f"registry.internal/ociregistry@sha256:{'1' * 64}"),
    ],
)
def test_images_of_the_chart_are_found(name: str, image: str) -> None:
    """`helm template … | ociregistry load -` loads what `images` prints."""
    text = render(CASES[name].values).text
    done = subprocess.run(twistd("images", "-"), input=text, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [image]
