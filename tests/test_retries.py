"""Photos that were set aside are tried again."""

from collections import Counter
from dataclasses import replace

import pytest
from conftest import HERE, SETTINGS
from photos import name_at, write_photos
from present import present
from test_build import contents, quarantine
from test_panoramas import write_panoramas
from test_updates import labels, samples, sound, write_cell

from preprocessing.build import build
from preprocessing.revisions import Revision
from preprocessing.sources import Source
from preprocessing.updates import add, retry_quarantined
from shards.dataset import Dataset


@pytest.mark.slow
def test_photos_fetched_anew_are_appended_under_their_labels_and_leave_quarantine(tmp_path):
    photos = write_photos(tmp_path / "photos")
    build(tmp_path / "photos", tmp_path / "clean", SETTINGS, HERE)
    good = {p: p.read_bytes() for p in photos}
    for photo in photos[::8]:
        photo.write_bytes(good[photo][:300])
    (tmp_path / "photos" / "nowhere.jpg").write_bytes(b"x")
    out = tmp_path / "out"
    build(tmp_path / "photos", out, SETTINGS, HERE)
    assert len(quarantine(out)) == 7
    assert retry_quarantined(out, HERE) is None
    for photo in photos[8::8]:
        photo.write_bytes(good[photo])
    summary, recovered, tried = present(retry_quarantined(out, HERE))
    assert (recovered, tried, summary.manifest.revision, summary.manifest.images) == (5, 6, 2, 47)
    assert quarantine(out) == {photos[0].name: "truncated", "nowhere.jpg": "no coordinates"}
    photos[0].write_bytes(good[photos[0]])
    retry_quarantined(out, HERE)
    assert quarantine(out) == {"nowhere.jpg": "no coordinates"}
    assert samples(out) == samples(tmp_path / "clean")
    assert labels(out) == labels(tmp_path / "clean")
    assert Dataset.open(out).classes.fingerprint() == Dataset.open(tmp_path / "clean").classes.fingerprint()
    sound(out)
    before = contents(out)
    build(tmp_path / "photos", out, SETTINGS, HERE)
    assert contents(out) == before


def test_photos_that_turn_bad_again_after_they_were_tried_leave_an_empty_shard_that_is_sound(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos")
    good = photos[0].read_bytes()
    photos[0].write_bytes(good[:300])
    out = tmp_path / "out"
    build(tmp_path / "photos", out, SETTINGS, HERE)
    photos[0].write_bytes(good)
    save = Revision.save
    monkeypatch.setattr(Revision, "save", lambda *a: (save(*a), photos[0].write_bytes(b"")))
    summary, _, _ = present(retry_quarantined(out, HERE))
    assert (summary.manifest.images, quarantine(out)) == (47, {photos[0].name: "empty file"})
    sound(out)
    monkeypatch.undo()
    photos[0].write_bytes(good)
    assert present(retry_quarantined(out, HERE))[0].manifest.images == 48
    sound(out)


@pytest.mark.slow
def test_panoramas_are_added_and_retried_crop_by_crop(tmp_path):
    names = write_panoramas(tmp_path / "panos", 3)
    settings = replace(SETTINGS, crops=12)
    good = (tmp_path / "panos" / names[0]).read_bytes()
    (tmp_path / "panos" / names[0]).write_bytes(b"")
    out = tmp_path / "out"
    build(Source.of(tmp_path / "panos", None, 12), out, settings, HERE)
    (tmp_path / "panos" / names[0]).write_bytes(good)
    _, recovered, tried = present(retry_quarantined(out, HERE))
    assert (recovered, tried) == (12, 12)
    build(Source.of(tmp_path / "panos", None, 12), tmp_path / "clean", settings, HERE)
    assert samples(out) == samples(tmp_path / "clean")
    write_cell(tmp_path / "more", 0, 2, first=100)
    for i in range(2):  # photos and panoramas side by side
        (tmp_path / "strips").mkdir(exist_ok=True)
        (tmp_path / "strips" / name_at(500003 + i, 4180003, 900 + i)).write_bytes(good)
    add(Source.of(tmp_path / "more"), out, HERE, crops=0)
    summary, gain = present(add(Source.of(tmp_path / "strips"), out, HERE))
    assert (gain.images, summary.manifest.images, summary.manifest.revision) == (24, 36 + 2 + 24, 4)
    turns = Counter(row[1].count("#") for row in samples(out))
    assert turns == {0: 2, 1: 60}
    sound(out)
