"""Pages of lists (OCI Distribution specification, "Listing Tags"): how one is asked for, and which comes after it.

An upstream names its next page by the URL in a Link header. Only the query of that URL is used: it may hold a token
of the upstream's own, such as `next_page` of Quay or `last` of ECR, instead of the tag after which the page begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, unquote_plus, urlencode, urlsplit

from ociregistry.names import Tag

_LONGEST_QUERY = 4096
_QUERY = re.compile(rf"[A-Za-z0-9._~!$'()*+,:@/?%=&-]{{0,{_LONGEST_QUERY}}}")
_NEXT = re.compile(r'<([^<>]*)>\s*(?:;[^<>,;]*)*?;\s*rel\s*=\s*"?next"?\s*(?:[;,]|$)', re.IGNORECASE)
"""A link to the next page (RFC 8288), of which `rel` need not be the first parameter."""


def parse_page_query(text: str) -> str:
    """Parse the query by which an upstream names a page; leave out the parameter `ns`, which each request adds.

    Raises:
        ValueError: it is too long, or not the query of a URL.
    """
    if not _QUERY.fullmatch(text):
        raise ValueError(f"{text[:100]!r} is not a query of at most {_LONGEST_QUERY} characters")
    return "&".join(one for one in text.split("&") if one and unquote_plus(one.partition("=")[0]) != "ns")


def next_page_query(links: Sequence[str]) -> str:
    """Return the query of the next page from the Link headers of a response; the empty string if there is none.

    Raises:
        ValueError: the link is not a URL, or its query is malformed.
    """
    found = next((match[1] for match in map(_NEXT.search, links) if match), "")
    try:
        query = urlsplit(found).query
    except ValueError:
        raise ValueError("it is not a URL") from None
    return parse_page_query(query)


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A request for at most `count` tags (None: no limit) after the tag `last` (empty: from the first).

    `named` is the query by which the upstream named this page, and takes the place of both in requests to it; it is
    empty where they suffice.
    """

    count: int | None = None
    last: str = ""
    named: str = ""

    @property
    def query(self) -> str:
        """The query of the request to the upstream."""
        return self.named or urlencode(self._own)

    @property
    def path(self) -> str:
        """The path of the request to the upstream, below the repository."""
        return "tags/list" + (f"?{self.query}" if self.query else "")

    @property
    def client_query(self) -> str:
        """The query by which a client asks this program for the page."""
        return urlencode(self._own | ({"next": self.named} if self.named else {}))

    @property
    def _own(self) -> dict[str, str]:
        return ({"last": self.last} if self.last else {}) | ({"n": str(self.count)} if self.count is not None else {})

    def following(self, tags: Sequence[Tag], query: str) -> PageRequest | None:
        """Return the request for the page after this one, which has these `tags`; the upstream names it by `query`.

        Returns:
            None if there is none: `query` is empty, or the upstream sends the same page over and over.
        """
        last = tags[-1] if tags else self.last
        if not query or query == self.query or (tags and last == self.last):
            return None
        plain = PageRequest(self.count, last)
        same = sorted(parse_qsl(query, keep_blank_values=True)) == sorted(plain._own.items())
        return plain if same else replace(plain, named=query)


FIRST_PAGE = PageRequest()


@dataclass(frozen=True, slots=True)
class TagPage:
    """A page of tags, and the request for the next page; None if this is the last."""

    tags: tuple[Tag, ...]
    following: PageRequest | None = None
