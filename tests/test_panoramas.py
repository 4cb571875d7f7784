"""Panoramas, cut into crops by heading."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import simplejpeg
from conftest import HERE, SETTINGS
from photos import jpeg, name_at, picture, samples

from preprocessing.build import build, dry_run
from preprocessing.plan import make_plan
from preprocessing.revisions import read_bad
from preprocessing.samples import cut_crop
from preprocessing.sources import Source
from preprocessing.summaries import print_forecast
from preprocessing.updates import add
from shards.dataset import Dataset
from shards.index import open_index
from shards.reader import ShardReader
from shards.verification import verify


def write_panoramas(folder: Path, count: int = 4, width: int = 1248, height: int = 192) -> list[str]:
    """Panoramas whose colour tells the direction: red grows from west to east of the strip."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        strip = np.zeros((height, width, 3), np.uint8)
        strip[:, :, 0] = np.linspace(0, 255, width).astype(np.uint8)
        strip[:, :, 1] = 128
        names.append(name_at(500003 + i, 4180003, 90 * i))
        (folder / names[-1]).write_bytes(simplejpeg.encode_jpeg(strip, quality=95, colorsubsampling="444"))
    return names


def test_panoramas_are_cut_into_crops_whose_headings_go_round(tmp_path):
    write_panoramas(tmp_path / "panos")
    settings = replace(SETTINGS, crops=12)
    summary = build(Source.of(tmp_path / "panos", None, 12), tmp_path / "out", settings, HERE)
    rows = samples(tmp_path / "out")
    assert summary.manifest.images == 48
    assert summary.source_bytes == sum(p.stat().st_size for p in (tmp_path / "panos").iterdir())  # each read once
    reader = ShardReader(open_index(tmp_path / "out", Dataset.open(tmp_path / "out").classes))
    for row_number, row in enumerate(rows):
        path, _, turn = row["source"].rpartition("#")
        heading = int(path.split("@")[9] or 0)
        assert row["heading"] == (heading + float(turn)) % 360
        crop = simplejpeg.decode_jpeg(reader.read(rows_group(tmp_path / "out"), row_number)).astype(float)
        red = crop[:, 24:40, 0].mean()  # the crop's middle; the seam of the strip lies at 180 degrees
        if turn != "180":
            assert abs(red - 255 * ((float(turn) / 360 + 0.5) % 1)) < 4


def test_panoramas_that_are_not_to_be_cut_are_told_before_and_during_a_build(tmp_path, capsys):
    write_panoramas(tmp_path / "panos", 12)
    source = Source.of(tmp_path / "panos")
    said = "most photos are at least twice as wide as high and are squeezed into squares; cut panoramas with --crops 12"
    print_forecast(dry_run(source, tmp_path / "dry", SETTINGS, HERE), "dry")
    assert f"shapes      {said}\n" in capsys.readouterr().out
    build(source, tmp_path / "out", SETTINGS, HERE)
    assert f"warning: {said}\n" in capsys.readouterr().err
    cut = replace(SETTINGS, crops=12)
    print_forecast(dry_run(Source.of(tmp_path / "panos", None, 12), tmp_path / "cut", cut, HERE), "cut")
    assert "shapes" not in capsys.readouterr().out


def rows_group(out: Path) -> int:
    return Dataset.open(out).classes.groups[0]


def test_a_crop_wraps_round_the_seam():
    strip = np.arange(1000, dtype=np.uint16).astype(np.uint8)[None, :, None].repeat(200, 0)
    assert cut_crop(strip, 0)[0, :, 0].tolist() == strip[0, 400:600, 0].tolist()
    assert cut_crop(strip, 180)[0, :, 0].tolist() == np.roll(strip[0, :, 0], 100)[:200].tolist()


def test_the_last_panorama_of_a_class_may_be_cut_by_the_end_of_a_shard(tmp_path, monkeypatch):
    write_panoramas(tmp_path / "panos")
    settings = replace(SETTINGS, crops=12)
    source = Source.of(tmp_path / "panos", None, 12)
    build(source, tmp_path / "whole", settings, HERE)
    monkeypatch.setattr("preprocessing.plan.SHARD_SAMPLES", 7)

    plan = make_plan(source.photos(None, 0), settings)
    pieces = [s for task in plan.tasks() for s in task.samples]
    assert pieces == [row["source"] for row in samples(tmp_path / "whole")]


def test_of_panoramas_cut_into_one_crop_more_can_be_added(tmp_path):
    write_panoramas(tmp_path / "panos", 12)
    settings = replace(SETTINGS, crops=1)
    build(Source.of(tmp_path / "panos", None, 1), tmp_path / "out", settings, HERE)
    (tmp_path / "more").mkdir()
    for i in range(3):
        (tmp_path / "more" / name_at(500003 + i, 4180003, 7000 + i)).write_bytes(jpeg(96, i))
    write_panoramas(tmp_path / "wide", 2)
    for photo in (tmp_path / "wide").iterdir():
        photo.rename(tmp_path / "more" / photo.name.replace("pano", "more"))
    add(Source.of(tmp_path / "more"), tmp_path / "out", replace(HERE, max_bad_share=1))
    added = [row["source"] for row in samples(tmp_path / "out") if row["source"].startswith("//1/")]
    assert len(added) == 2
    assert all(source.endswith(".jpg#0") for source in added)
    assert [b.reason for b in read_bad(tmp_path / "out" / "quarantine.jsonl")] == ["not a panorama"] * 3
    add(Source.of(tmp_path / "more"), tmp_path / "out", HERE, crops=0)
    assert verify(tmp_path / "out").problems == []


def test_what_is_no_panorama_is_set_aside_crop_by_crop(tmp_path):
    names = write_panoramas(tmp_path / "panos")
    (tmp_path / "panos" / names[0]).write_bytes(jpeg(256, 1))
    (tmp_path / "panos" / names[1]).write_bytes(simplejpeg.encode_jpeg(picture(256, 1))[:500])
    summary = build(
        Source.of(tmp_path / "panos", None, 12),
        tmp_path / "out",
        replace(SETTINGS, crops=12),
        replace(HERE, max_bad_share=1),
    )
    assert summary.reasons == {"not a panorama": 12, "truncated": 12}
    details = {b.detail for b in read_bad(tmp_path / "out" / "quarantine.jsonl") if b.reason == "not a panorama"}
    assert details == {"1.00 times as wide as high, less than twice"}  # of the photo, not of its scaled decoding
    assert summary.manifest.images == 24
