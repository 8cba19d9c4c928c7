"""Records: written so that they can be read, by us, by grep and by jq, and never taken for what they are not."""

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
from tests.unit.support.doubles import image, manifest

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
# What a clock may say; whole milliseconds are as likely as others.
MOMENTS = st.builds(
    lambda seconds, micro, hours: datetime.fromtimestamp(seconds, timezone(timedelta(hours=hours))).replace(
        microsecond=micro
    ),
    st.integers(0, 10**10),
    st.sampled_from([0, 1000]) | st.integers(0, 999_999),
    st.sampled_from([0, 5]),
)


def document(record: Record) -> dict[str, Any]:
    """What stands in the file."""
    rendered: dict[str, Any] = json.loads(record.render())
    return rendered


def damaged(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file of a good record, after a change."""
    rendered = document(Record(IMAGE, {}).confirm(NGINX, EARLY))
    change(rendered)
    return json.dumps(rendered).encode()


def test_a_record_is_a_file_for_grep_and_jq() -> None:
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


def test_confirming_keeps_when_it_was_created_and_the_other_images() -> None:
    other = image(f"quay.io/app@{IMAGE.digest}")
    record = Record(IMAGE, {}).confirm(NGINX, EARLY).confirm(other, EARLY).confirm(NGINX, LATE)
    assert record.images == {str(NGINX): Dates(EARLY, LATE), str(other): Dates(EARLY, EARLY)}
    assert record.manifest is IMAGE


def test_confirming_with_a_creation_keeps_the_first_creation_and_the_last_confirmation() -> None:
    """What is imported brings its dates along; it neither moves a tag back nor makes it younger."""
    middle = EARLY + timedelta(days=1)
    assert Record(IMAGE, {}).confirm(NGINX, LATE, EARLY).images == {str(NGINX): Dates(EARLY, LATE)}
    known = Record(IMAGE, {}).confirm(NGINX, middle)
    assert known.confirm(NGINX, EARLY, EARLY).images == {str(NGINX): Dates(EARLY, middle)}
    assert known.confirm(NGINX, LATE, EARLY).images == {str(NGINX): Dates(EARLY, LATE)}
    assert known.confirm(NGINX, LATE, LATE).images == {str(NGINX): Dates(middle, LATE)}
    assert known.confirm(NGINX, EARLY).images == {str(NGINX): Dates(EARLY, middle)}


def test_confirming_leaves_the_record_as_it_was() -> None:
    record = Record(IMAGE, {})
    record.confirm(NGINX, EARLY)
    assert record.images == {}


def test_what_a_record_means() -> None:
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
def test_the_bytes_of_a_manifest_are_kept_exactly(text: str, algorithm: str) -> None:
    """Whatever is UTF-8; what JSON would spell otherwise is no reason to spell it otherwise."""
    try:
        data = json.dumps({"schemaVersion": 2, "manifests": [], "x": text}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    kept = Manifest.parse(data, OCI_INDEX, Digest.of(data, algorithm))
    assert Record.parse(Record(kept, {}).render(), kept.digest).manifest.data == data


@pytest.mark.parametrize("host", ["registry", "localhost", "my-upstream"])
def test_an_upstream_without_dot_or_port_stays_what_it_is(host: str) -> None:
    """`?ns=registry` and `--default-ns registry` name one; docker.io/registry/… is somebody else's."""
    held = ImageReference(Repository.at(Upstream.parse(host), "team/app"), Tag("1"))
    record = Record(IMAGE, {}).confirm(held, EARLY)
    assert list(Record.parse(record.render(), IMAGE.digest).images) == [f"{host}/team/app:1"]


def test_a_time_of_another_zone_is_the_same_moment() -> None:
    def change(rendered: dict[str, Any]) -> None:
        rendered["images"][str(NGINX)]["confirmed"] = "2026-03-02T00:17:30+02:00"

    record = Record.parse(damaged(change), IMAGE.digest)
    assert record.images[str(NGINX)].confirmed == EARLY
    assert b'"confirmed": "2026-03-01T22:17:30.000000Z"' in record.render()


def test_a_very_early_time_survives_a_rewrite() -> None:
    """Go's zero time, which other programs write where they mean `never`."""

    def change(rendered: dict[str, Any]) -> None:
        rendered["images"][str(NGINX)]["created"] = "0001-01-01T00:00:00Z"

    record = Record.parse(damaged(change), IMAGE.digest).confirm(NGINX, LATE)
    assert Record.parse(record.render(), IMAGE.digest) == record


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"5", b'"text"', b"{}", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 5000]
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(RecordInvalid):
        Record.parse(data, IMAGE.digest)


def test_a_file_that_was_cut_off_is_no_record() -> None:
    rendered = Record(IMAGE, {}).confirm(NGINX, EARLY).render()
    assert Record.parse(rendered.rstrip(), IMAGE.digest).images
    for length in range(0, len(rendered) - 2, 7):
        with pytest.raises(RecordInvalid):
            Record.parse(rendered[:length], IMAGE.digest)


def test_a_file_under_another_name_is_no_record() -> None:
    with pytest.raises(RecordInvalid, match="does not match the file name"):
        Record.parse(Record(IMAGE, {}).render(), Digest.of(b"another"))


VALUES = [None, 5, True, [], ["a"], {}, "", "text", {"a": None}, "\ud800"]


@pytest.mark.parametrize("key", ["digest", "mediaType", "images", "manifest"])
def test_every_key_is_looked_at(key: str) -> None:
    rendered = document(Record(IMAGE, {}).confirm(NGINX, EARLY))
    good = rendered.pop(key)
    foreign = [rendered, *({**rendered, key: value} for value in VALUES if (key, value) != ("images", {}))]
    for one in foreign:
        with pytest.raises(RecordInvalid):
            Record.parse(json.dumps(one).encode(), IMAGE.digest)
    assert Record.parse(json.dumps({**rendered, key: good}).encode(), IMAGE.digest).manifest == IMAGE


@pytest.mark.parametrize("key", ["created", "confirmed"])
def test_every_date_is_looked_at(key: str) -> None:
    rendered = document(Record(IMAGE, {}).confirm(NGINX, EARLY))
    for value in [*VALUES, "2026-03-01T22:17:30", "2026-13-01T22:17:30Z", "yesterday", 1772403450]:
        rendered["images"][str(NGINX)][key] = value
        with pytest.raises(RecordInvalid):
            Record.parse(json.dumps(rendered).encode(), IMAGE.digest)


@pytest.mark.parametrize(
    "url", ["", "nginx", "docker.io/nginx", "../../etc/passwd:1", "docker.io/a@sha256:0", "a b:1"]
)
def test_every_image_url_is_looked_at(url: str) -> None:
    dates = {"created": "2026-03-01T22:17:30Z", "confirmed": "2026-03-01T22:17:30Z"}
    with pytest.raises(RecordInvalid):
        Record.parse(damaged(lambda rendered: rendered["images"].update({url: dates})), IMAGE.digest)


def test_a_manifest_whose_digest_does_not_hold_is_refused() -> None:
    def change(rendered: dict[str, Any]) -> None:
        rendered["manifest"] += " "

    with pytest.raises(RecordInvalid, match="digest"):
        Record.parse(damaged(change), IMAGE.digest)


def test_keys_of_a_later_version_are_no_damage() -> None:
    data = damaged(lambda rendered: rendered.update({"platform": "linux/amd64"}))
    assert Record.parse(data, IMAGE.digest).manifest == IMAGE


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_foreign_document_is_refused_and_nothing_else_happens(foreign: object) -> None:
    with pytest.raises(RecordInvalid):
        Record.parse(json.dumps(foreign).encode(), IMAGE.digest)


@pytest.mark.parametrize("key", ["digest", "mediaType", "images", "manifest"])
def test_what_lacks_one_key_is_one_of_ours_and_damaged(key: str) -> None:
    with pytest.raises(RecordInvalid, match=key) as raised:
        Record.parse(damaged(lambda rendered: rendered.pop(key)), IMAGE.digest)
    assert raised.type is RecordInvalid


def test_what_lacks_more_of_them_is_foreign_and_not_damaged() -> None:
    with pytest.raises(ForeignRecord, match="it has no images, manifest"):
        Record.parse(damaged(lambda rendered: (rendered.pop("images"), rendered.pop("manifest"))), IMAGE.digest)


@pytest.mark.parametrize("data", [b"null", b"[]", b"5", b"{}", b'{"type": 3, "digest": "ab", "imageUrl": "a:1"}'])
def test_other_json_is_foreign(data: bytes) -> None:
    with pytest.raises(ForeignRecord, match="images"):
        Record.parse(data, IMAGE.digest)


def test_what_is_ours_and_does_not_hold_is_damaged() -> None:
    rendered = Record(IMAGE, {}).confirm(NGINX, EARLY).render()
    changed = rendered.replace(b"schemaVersion", b"schemaversion")
    other = rendered.replace(f'"{IMAGE.digest}"'.encode(), f'"{Digest.of(b"another")}"'.encode())
    for data in (b"", rendered[:-9], changed, other, damaged(lambda rendered: rendered.update(images=[]))):
        assert data != rendered
        with pytest.raises(RecordInvalid) as raised:
            Record.parse(data, IMAGE.digest)
        assert not isinstance(raised.value, ForeignRecord)


def test_dates_are_read_as_a_record_spells_them() -> None:
    read = Dates.parse("2026-03-01T22:17:30.000000Z", "2026-03-04T23:17:30.000001+01:00")
    assert read == Dates(EARLY, LATE)
    for bad in ("", "yesterday", "2026-03-01T22:17:30", "2026-02-30T00:00:00Z", "2026-03-01"):
        for created, confirmed in ((bad, "2026-03-01T22:17:30Z"), ("2026-03-01T22:17:30Z", bad)):
            with pytest.raises(ValueError, match=r"."):
                Dates.parse(created, confirmed)
