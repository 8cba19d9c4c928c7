"""GET /health: that the daemon answers, and what it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime

from ociregistry import __version__
from ociregistry.chain import Chain
from ociregistry.pullthrough.completion import Incomplete
from ociregistry.pullthrough.preloading import Preloaded
from ociregistry.store.space import Room
from ociregistry.store.store import Counts
from ociregistry.web.answers import Answer, json_answer
from ociregistry.web.requests import Query
from ociregistry.web.serving import Handler


def health(
    counts: Callable[[], Counts],
    incomplete: Callable[[], Incomplete],
    preloaded: Callable[[], Preloaded | None],
    room: Callable[[], Room],
    started: datetime,
) -> Handler:
    """What answers such requests; all but `started` are asked each time."""

    async def answer(method: str, path: bytes, query: Query, chain: Chain) -> Answer:
        held, lacking, preloading = counts(), incomplete(), preloaded()
        return json_answer(
            200,
            {
                "status": "ok",
                "version": __version__,
                "started": started.isoformat(timespec="seconds"),
                "lists": held.lists,
                "images": held.images,
                "incomplete_images": lacking.images,
                "missing_bytes": lacking.bytes,
                "pending_images": lacking.pending,
                "incomplete_indexes": lacking.indexes,
                "disk": asdict(room()),
                **({"preload": asdict(preloading)} if preloading else {}),
            },
        )

    return answer
