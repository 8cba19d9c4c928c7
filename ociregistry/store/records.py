"""A record: a manifest as stored, one JSON file made for `grep`, `cat` and `jq`.

{"digest": …, "mediaType": …,
 "images": {"docker.io/library/nginx:1.25": {"created": "2026-03-01T22:17:30.000000Z", "confirmed": …}},
 "wanted": true,
 "manifest": "the exact bytes that the digest names, as a JSON string"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from ociregistry.errors import RegistryError
from ociregistry.manifests import Manifest, ManifestInvalid
from ociregistry.names import Digest, ImageReference

_KEYS = {"digest", "mediaType", "images", "manifest"}
_SLIP = 1
"""Keys that one of ours may lack for being damaged; a foreign one lacks more."""


class RecordInvalid(ValueError):
    """The file is damaged or in a foreign format; the message says what is wrong with it."""


class ForeignRecord(RecordInvalid):
    """The file is in a foreign format: it is whole, perhaps, but not ours."""


@dataclass(frozen=True, slots=True)
class Dates:
    """When an image URL was first and last seen to mean this manifest."""

    created: datetime
    confirmed: datetime

    @classmethod
    def parse(cls, created: str, confirmed: str) -> Dates:
        """The dates as a record spells them; raises `ValueError`."""
        return cls(_time(created), _time(confirmed))


@dataclass(frozen=True, slots=True)
class Record:
    """A manifest and the image URLs that it is known by."""

    manifest: Manifest
    images: Mapping[str, Dates]
    wanted: bool | None = None
    """Whether the layers of the image belong into the store; False for one that is kept as metadata alone.

    None where the record does not say, as in those of earlier versions.
    """

    def confirm(
        self,
        image: ImageReference,
        confirmed: datetime,
        created: datetime | None = None,
        *,
        wanted: bool | None = None,
    ) -> Record:
        """This record, where `image` was known to mean this manifest at `confirmed`, and since `created`.

        Of what is noted already, the first creation and the last confirmation stay; an image stays `wanted`.
        """
        known = self.images.get(str(image), Dates(created or confirmed, confirmed))
        merged = Dates(min(known.created, created or confirmed), max(known.confirmed, confirmed))
        return replace(self, images={**self.images, str(image): merged}, wanted=wanted or self.wanted)

    def means(self, image: ImageReference) -> bool:
        """Whether `image` is this manifest: a digest whatever the repository, a tag where it is noted."""
        return image.reference == self.manifest.digest or str(image) in self.images

    @property
    def has_tag(self) -> bool:
        """Whether some tag means this manifest."""
        return any("@" not in url for url in self.images)

    def render(self) -> bytes:
        """The bytes of the file."""
        document = {
            "digest": self.manifest.digest,
            "mediaType": self.manifest.media_type,
            "images": {
                url: {"created": _spell(dates.created), "confirmed": _spell(dates.confirmed)}
                for url, dates in sorted(self.images.items())
            },
            **({} if self.wanted is None else {"wanted": self.wanted}),
            "manifest": self.manifest.data.decode("utf-8"),
        }
        return json.dumps(document, indent=2).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, digest: Digest) -> Record:
        """The record in a file named after `digest`; raises `RecordInvalid`."""
        try:
            document = json.loads(data)
            lacking = _KEYS - document.keys() if isinstance(document, dict) else _KEYS
            if len(lacking) > _SLIP:
                raise ForeignRecord(f"not a record of this program: it has no {', '.join(sorted(lacking))}")
            if document["digest"] != digest:
                raise RecordInvalid(f"it holds {document['digest']}, not what its name says")
            manifest = Manifest.parse(document["manifest"].encode("utf-8"), document["mediaType"], digest)
            images = {
                str(ImageReference.parse_whole(url)): Dates.parse(dates["created"], dates["confirmed"])
                for url, dates in document["images"].items()
            }
        except (RegistryError, ManifestInvalid) as error:
            raise RecordInvalid(str(error)) from None
        except RecordInvalid:
            raise
        except (ValueError, RecursionError) as error:
            raise RecordInvalid(f"not JSON, or cut off: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordInvalid(f"not a record of this program: {type(error).__name__} {error}") from None
        wanted = document.get("wanted")
        return cls(manifest, images, wanted if isinstance(wanted, bool) else None)


def _spell(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise RecordInvalid(f"the time {text!r} has no time zone")
    return time
