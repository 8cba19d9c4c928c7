"""Fixtures for the tests of the chart."""

from __future__ import annotations

import pytest

from tests.chart.rendering import Rendered, render
from tests.chart.values import CASES, Case


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """The name of a case."""
    return str(request.param)


@pytest.fixture
def case(name: str) -> Case:
    """The values of the case."""
    return CASES[name]


@pytest.fixture
def rendered(case: Case) -> Rendered:
    """The chart with the values of the case."""
    return render(case.values)
