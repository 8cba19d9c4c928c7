"""Rules of the scripted registry for resumed downloads, beside those of upstream_rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from tests.upstream_http import Answer, Handler, Request, Rule


@dataclass(frozen=True)
class Other(Rule):
    """Another file of the same size."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return a body that differs in every byte."""
        answer = handler(request)
        return replace(answer, body=bytes(byte ^ 0xFF for byte in answer.body))


@dataclass(frozen=True)
class WhenRanged(Rule):
    """Apply other rules to requests with a Range, the last rule first; answer the others correctly."""

    rules: tuple[Rule, ...]

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Apply the rules."""
        if request.header("Range") is not None:
            for rule in self.rules:
                handler = partial(rule, handler=handler)
        return handler(request)
