"""Records: format, round trip, confirmation, and detection of damaged and foreign files."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag, Upstream
from ociregistry.store.records import Dates, ForeignRecord, Record, RecordInvalid
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest

IMAGE = manifest(make_image("records"))
NGINX = image("docker.io/library/nginx:1.25")
EARLY = datetime(2026, 3, 1, 22, 17, 30, tzinfo=UTC)
LATE = EARLY + timedelta(days=3, microseconds=1)

URLS = st.builds(
    lambda host, path, tag: ImageReference(Repository.at(Upstream.parse(host), path), Tag.parse(tag)),
    st.sampled_from(["docker.io", "localhost", "reg.example:5000", "[::1]:5000", "10.0.0.1"]),
    st.sampled_from(["nginx", "team/app", "a/b/c"]),
    st.sampled_from(["latest", "V1.2_x-y"]),
)
# Possible times of a clock, with whole milliseconds as likely as others.
MOMENTS = st.builds(
    lambda seconds, micro, hours: datetime.fromtimestamp(seconds, timezone(timedelta(hours=hours))).replace(
        microsecond=micro
    ),
    st.integers(0, 10**10),
    st.sampled_from([0, 1000]) | st.integers(0, 999_999),
    st.sampled_from([0, 5]),
)


def document(record: Record) -> dict[str, Any]:
    """Return the JSON document of the record."""
    rendered: dict[str, Any] = json.loads(record.render())
    return rendered


def damaged(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the file of a valid record after a change."""
    rendered = document(Record(IMAGE, {}).confirm(NGINX, EARLY))
    change(rendered)
    return json.dumps(rendered).encode()


def test_format_is_readable_by_grep_and_jq() -> None:
    rendered = Record(IMAGE, {}).confirm(NGINX, EARLY).confirm(NGINX, LATE).render()
    assert json.loads(rendered) == {
        "digest": IMAGE.digest,
        "mediaType": IMAGE.media_type,
        "images": {
            "docker.io/library/nginx:1.25": {
                "created": "2026-03-01T22:17:30.000000Z",
                "confirmed": "2026-03-04T22:17:30.000001Z",
            },
        },
        "manifest": IMAGE.data.decode(),
    }
    assert rendered.endswith(b"}\n")
    assert rendered.isascii()
    assert any(b'"docker.io/library/nginx:1.25"' in line for line in rendered.splitlines())


def test_confirm_keeps_created_and_other_images() -> None:
    other = image(f"quay.io/app@{IMAGE.digest}")
    record = Record(IMAGE, {}).confirm(NGINX, EARLY).confirm(other, EARLY).confirm(NGINX, LATE)
    assert record.images == {str(NGINX): Dates(EARLY, LATE), str(other): Dates(EARLY, EARLY)}
    assert record.manifest is IMAGE


def test_confirm_with_created_keeps_earliest_created_and_latest_confirmed() -> None:
    """Imports have dates of their own, which neither move a tag back nor make it younger."""
    middle = EARLY + timedelta(days=1)
    assert Record(IMAGE, {}).confirm(NGINX, LATE, EARLY).images == {str(NGINX): Dates(EARLY, LATE)}
    known = Record(IMAGE, {}).confirm(NGINX, middle)
    assert known.confirm(NGINX, EARLY, EARLY).images == {str(NGINX): Dates(EARLY, middle)}
    assert known.confirm(NGINX, LATE, EARLY).images == {str(NGINX): Dates(EARLY, LATE)}
    assert known.confirm(NGINX, LATE, LATE).images == {str(NGINX): Dates(middle, LATE)}
    assert known.confirm(NGINX, EARLY).images == {str(NGINX): Dates(EARLY, middle)}


def test_confirm_does_not_change_the_record() -> None:
    record = Record(IMAGE, {})
    record.confirm(NGINX, EARLY)
    assert record.images == {}


def test_record_has_at_most_1000_image_urls() -> None:
    """Tags stay longest, and those confirmed last."""
    record = Record(IMAGE, {}).confirm(image(f"reg.example/app@{IMAGE.digest}"), LATE)
    for number in range(1100):
        record = record.confirm(image(f"reg.example/app:{number}"), EARLY + timedelta(seconds=number))
    left = {int(url.rpartition(":")[2]) for url in record.images if "@" not in url}
    assert (len(record.images), left) == (1000, set(range(100, 1100)))
    # What is confirmed now stays, with whichever date.
    for last in (image(f"reg.example/last@{IMAGE.digest}"), image("reg.example/last:1")):
        record = record.confirm(last, EARLY - timedelta(days=9))
        assert len(record.images) == 1000
        assert str(last) in record.images


def test_one_upstream_does_not_take_the_place_of_the_names_of_another() -> None:
    """Any host may show a manifest under any number of names, once it has got it."""
    record = Record(IMAGE, {}).confirm(NGINX, EARLY).confirm(image(f"quay.io/app@{IMAGE.digest}"), EARLY)
    for number in range(1100):
        record = record.confirm(image(f"host.invalid/app:{number}"), LATE)
    assert len(record.images) == 1000
    assert record.images.keys() >= {str(NGINX), f"quay.io/app@{IMAGE.digest}"}


def test_large_record_of_an_earlier_version_shrinks() -> None:
    many = {f"host-{number}.invalid/app@{IMAGE.digest}": Dates(LATE, LATE) for number in range(20_000)}
    record = Record(IMAGE, {str(NGINX): Dates(EARLY, EARLY), **many})
    again = Record.parse(record.render(), IMAGE.digest).confirm(image("quay.io/app:1"), LATE)
    assert len(again.images) == 1000
    assert again.images.keys() >= {str(NGINX), "quay.io/app:1"}


def test_meaning_of_a_record() -> None:
    record = Record(IMAGE, {}).confirm(NGINX, EARLY)
    assert record.means(NGINX)
    assert not record.means(image("docker.io/library/nginx:1.26"))
    assert not record.means(image("quay.io/library/nginx:1.25"))
    assert record.means(image(f"quay.io/app@{IMAGE.digest}"))
    assert not record.means(image(f"docker.io/library/nginx@{Digest.of(b'another')}"))


@given(st.dictionaries(URLS.map(str), st.builds(Dates, MOMENTS, MOMENTS), max_size=4), st.booleans())
def test_records_round_trip(images: dict[str, Dates], is_list: bool) -> None:
    kept = manifest(make_index("records")) if is_list else IMAGE
    record = Record(kept, images)
    again = Record.parse(record.render(), kept.digest)
    assert again == record
    assert again.manifest.data == kept.data
    assert list(again.images) == sorted(images)


@given(st.text(max_size=40), st.sampled_from(["sha256", "sha512"]))
def test_manifest_bytes_are_kept_exactly(text: str, algorithm: str) -> None:
    """For all UTF-8; characters that JSON may escape are kept as they are."""
    try:
        data = json.dumps({"schemaVersion": 2, "manifests": [], "x": text}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    kept = Manifest.parse(data, OCI_INDEX, Digest.of(data, algorithm))
    assert Record.parse(Record(kept, {}).render(), kept.digest).manifest.data == data


@pytest.mark.parametrize("host", ["registry", "localhost", "my-upstream"])
def test_single_label_host_is_kept(host: str) -> None:
    """`?ns=registry` and `--default-ns registry` name one; docker.io/registry/… is another repository."""
    held = ImageReference(Repository.at(Upstream.parse(host), "team/app"), Tag("1"))
    record = Record(IMAGE, {}).confirm(held, EARLY)
    assert list(Record.parse(record.render(), IMAGE.digest).images) == [f"{host}/team/app:1"]


def test_times_of_other_zones_are_converted() -> None:
    def change(rendered: dict[str, Any]) -> None:
        rendered["images"][str(NGINX)]["confirmed"] = "2026-03-02T00:17:30+02:00"

    record = Record.parse(damaged(change), IMAGE.digest)
    assert record.images[str(NGINX)].confirmed == EARLY
    assert b'"confirmed": "2026-03-01T22:17:30.000000Z"' in record.render()


def test_year_1_survives_a_rewrite() -> None:
    """Go's zero time, which other programs write for `never`."""

    def change(rendered: dict[str, Any]) -> None:
        rendered["images"][str(NGINX)]["created"] = "0001-01-01T00:00:00Z"

    record = Record.parse(damaged(change), IMAGE.digest).confirm(NGINX, LATE)
    assert Record.parse(record.render(), IMAGE.digest) == record


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"5", b'"text"', b"{}", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 5000]
)
def test_malformed_record_is_refused(data: bytes) -> None:
    with pytest.raises(RecordInvalid):
        Record.parse(data, IMAGE.digest)


def test_truncated_record_is_refused() -> None:
    rendered = Record(IMAGE, {}).confirm(NGINX, EARLY).render()
    assert Record.parse(rendered.rstrip(), IMAGE.digest).images
    for length in range(0, len(rendered) - 2, 7):
        with pytest.raises(RecordInvalid):
            Record.parse(rendered[:length], IMAGE.digest)


def test_record_under_another_name_is_refused() -> None:
    with pytest.raises(RecordInvalid, match="does not match the file name"):
        Record.parse(Record(IMAGE, {}).render(), Digest.of(b"another"))


VALUES = [None, 5, True, [], ["a"], {}, "", "text", {"a": None}, "\ud800"]


@pytest.mark.parametrize("key", ["digest", "mediaType", "images", "manifest"])
def test_every_key_is_validated(key: str) -> None:
    rendered = document(Record(IMAGE, {}).confirm(NGINX, EARLY))
    good = rendered.pop(key)
    foreign = [rendered, *({**rendered, key: value} for value in VALUES if (key, value) != ("images", {}))]
    for one in foreign:
        with pytest.raises(RecordInvalid):
            Record.parse(json.dumps(one).encode(), IMAGE.digest)
    assert Record.parse(json.dumps({**rendered, key: good}).encode(), IMAGE.digest).manifest == IMAGE


@pytest.mark.parametrize("key", ["created", "confirmed"])
def test_every_date_is_validated(key: str) -> None:
    rendered = document(Record(IMAGE, {}).confirm(NGINX, EARLY))
    for value in [*VALUES, "2026-03-01T22:17:30", "2026-13-01T22:17:30Z", "yesterday", 1772403450]:
        rendered["images"][str(NGINX)][key] = value
        with pytest.raises(RecordInvalid):
            Record.parse(json.dumps(rendered).encode(), IMAGE.digest)


@pytest.mark.parametrize(
    "url", ["", "nginx", "docker.io/nginx", "../../etc/passwd:1", "docker.io/a@sha256:0", "a b:1"]
)
def test_every_image_url_is_validated(url: str) -> None:
    dates = {"created": "2026-03-01T22:17:30Z", "confirmed": "2026-03-01T22:17:30Z"}
    with pytest.raises(RecordInvalid):
        Record.parse(damaged(lambda rendered: rendered["images"].update({url: dates})), IMAGE.digest)


def test_manifest_digest_mismatch_is_refused() -> None:
    def change(rendered: dict[str, Any]) -> None:
        rendered["manifest"] += " "

    with pytest.raises(RecordInvalid, match="digest"):
        Record.parse(damaged(change), IMAGE.digest)


def test_unknown_keys_are_ignored() -> None:
    data = damaged(lambda rendered: rendered.update({"platform": "linux/amd64"}))
    assert Record.parse(data, IMAGE.digest).manifest == IMAGE


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_foreign_document_is_refused_without_side_effects(foreign: object) -> None:
    with pytest.raises(RecordInvalid):
        Record.parse(json.dumps(foreign).encode(), IMAGE.digest)


@pytest.mark.parametrize("key", ["digest", "mediaType", "images", "manifest"])
def test_record_lacking_one_key_is_damaged(key: str) -> None:
    with pytest.raises(RecordInvalid, match=key) as raised:
        Record.parse(damaged(lambda rendered: rendered.pop(key)), IMAGE.digest)
    assert raised.type is RecordInvalid


def test_record_lacking_several_keys_is_foreign() -> None:
    with pytest.raises(ForeignRecord, match="it has no images, manifest"):
        Record.parse(damaged(lambda rendered: (rendered.pop("images"), rendered.pop("manifest"))), IMAGE.digest)


@pytest.mark.parametrize("data", [b"null", b"[]", b"5", b"{}", b'{"type": 3, "digest": "ab", "imageUrl": "a:1"}'])
def test_other_json_is_foreign(data: bytes) -> None:
    with pytest.raises(ForeignRecord, match="images"):
        Record.parse(data, IMAGE.digest)


def test_own_but_inconsistent_record_is_damaged() -> None:
    rendered = Record(IMAGE, {}).confirm(NGINX, EARLY).render()
    changed = rendered.replace(b"schemaVersion", b"schemaversion")
    other = rendered.replace(f'"{IMAGE.digest}"'.encode(), f'"{Digest.of(b"another")}"'.encode())
    for data in (b"", rendered[:-9], changed, other, damaged(lambda rendered: rendered.update(images=[]))):
        assert data != rendered
        with pytest.raises(RecordInvalid) as raised:
            Record.parse(data, IMAGE.digest)
        assert not isinstance(raised.value, ForeignRecord)


def test_dates_are_parsed_as_rendered() -> None:
    read = Dates.parse("2026-03-01T22:17:30.000000Z", "2026-03-04T23:17:30.000001+01:00")
    assert read == Dates(EARLY, LATE)
    for bad in ("", "yesterday", "2026-03-01T22:17:30", "2026-02-30T00:00:00Z", "2026-03-01"):
        for created, confirmed in ((bad, "2026-03-01T22:17:30Z"), ("2026-03-01T22:17:30Z", bad)):
            with pytest.raises(ValueError, match=r"."):
                Dates.parse(created, confirmed)
