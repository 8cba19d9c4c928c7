"""The priorities of requests to an upstream, and which of them may use the reserved connections."""

from __future__ import annotations

import pytest

from ociregistry.context import FROM_CLIENT, IN_BACKGROUND, NO_VIA, Context, Priority
from ociregistry.upstream.registry import uses_reserved

LAYER, CONFIG = 64 * 1024 + 1, 64 * 1024


def test_priorities_are_ordered() -> None:
    names = ["METADATA", "PRELOAD", "BACKGROUND", "CLIENT", "URGENT"]
    assert [priority.name for priority in sorted(Priority)] == names


def test_priorities_below_client_pause() -> None:
    assert [priority for priority in Priority if priority.pauses] == [
        Priority.METADATA,
        Priority.PRELOAD,
        Priority.BACKGROUND,
    ]


def test_default_context_is_a_client_request() -> None:
    assert Context() == FROM_CLIENT == Context(NO_VIA, Priority.CLIENT)
    assert Context(NO_VIA, Priority.BACKGROUND) == IN_BACKGROUND


@pytest.mark.parametrize("size", [LAYER, None])
@pytest.mark.parametrize("priority", Priority)
def test_large_blob_uses_reserved_connections_by_priority(priority: Priority, size: int | None) -> None:
    assert uses_reserved(priority, size) is (priority in (Priority.METADATA, Priority.BACKGROUND))


@pytest.mark.parametrize("size", [0, CONFIG])
@pytest.mark.parametrize("priority", Priority)
def test_small_blob_uses_reserved_connections(priority: Priority, size: int) -> None:
    assert uses_reserved(priority, size)
