"""What may go wrong when a download is taken up: rules for the scripted registry, beside those of upstream_rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from tests.upstream_http import Answer, Handler, Request, Rule


@dataclass(frozen=True)
class Other(Rule):
    """Another file of the same size."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Not one byte is the same."""
        answer = handler(request)
        return replace(answer, body=bytes(byte ^ 0xFF for byte in answer.body))


@dataclass(frozen=True)
class WhenRanged(Rule):
    """Other rules for requests with a Range, those that come last first; the rest is answered as it should be."""

    rules: tuple[Rule, ...]

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """What the rules make of it."""
        if request.header("Range") is not None:
            for rule in self.rules:
                handler = partial(rule, handler=handler)
        return handler(request)
