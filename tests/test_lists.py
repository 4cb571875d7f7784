"""Photos named by a list, CSV or Parquet, as spreadsheets and other programs write them."""

import datetime as dt
import io
import os
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
import utm
from conftest import HERE, SETTINGS
from photos import jpeg, samples, write_csv, write_listed
from PIL import Image
from present import present
from test_build import quarantine

from preprocessing.build import build, dry_run
from preprocessing.photos import list_photos, reasons_of
from preprocessing.plan import make_plan
from preprocessing.resize import Resizer
from preprocessing.shard_run import Machinery
from preprocessing.shard_task import write_shard
from preprocessing.sources import Source, list_named
from shards.console import JobError
from shards.dataset import Dataset


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_list_gives_place_heading_and_time_of_photos_whose_names_say_nothing(tmp_path, kind):
    names = write_listed(tmp_path / "photos")
    columns = {
        "path": names,
        "east": [500003.0 + i % 12 for i in range(12)] + [500023.0 + i % 12 for i in range(12)],
        "north": [4180003.0] * 24,
        "zone": ["10S"] * 24,
        "heading": [float(i) for i in range(23)] + [None],
        "timestamp": ["201311"] * 24,
    }
    place = tmp_path / f"list.{kind}"
    csv.write_csv(pa.table(columns), place) if kind == "csv" else pq.write_table(pa.table(columns), place)
    made = build(Source.of(place, tmp_path / "photos"), tmp_path / "out", SETTINGS, HERE).manifest
    rows = {row["source"]: row for row in samples(tmp_path / "out")}
    assert (made.images, made.classes, made.utm_zone, made.quarantined) == (24, 2, 10, 0)
    assert rows["IMG_0005.jpg"]["heading"] == 5
    assert np.isnan(rows["IMG_0023.jpg"]["heading"])
    assert {row["timestamp"] for row in rows.values()} == {"201311"}
    assert rows["IMG_0013.jpg"]["east"] == 500024


@pytest.mark.parametrize(("separator", "decimal"), [(";", ","), ("\t", ","), (";", "."), (",", ".")])
def test_a_list_as_a_spreadsheet_of_any_language_writes_it_gives_the_same_places(tmp_path, separator, decimal):
    rows = [["Längengrad", "Longitude", "PATH", "Latitude", "Heading"]]
    rows += [["x", f"-48{decimal}00226", f"Foto ({i}).jpg", f"-22{decimal}5", f"1{decimal}5"] for i in range(3)]
    text = "\r\n".join(separator.join(row) for row in rows)
    (tmp_path / "liste.csv").write_text(text, encoding="utf-8-sig", newline="")
    listing = list_named(tmp_path / "liste.csv", tmp_path, 0)
    east, north, _, _ = utm.from_latlon(-22.5, -48.00226)
    assert listing.paths.to_pylist() == [f"Foto ({i}).jpg" for i in range(3)]
    assert listing.places is not None
    assert listing.places.east.tolist() == pytest.approx([east] * 3, abs=1e-6)
    assert listing.places.north.tolist() == pytest.approx([north] * 3, abs=1e-6)
    assert np.array_equal(present(listing.places.heading), [1.5] * 3)


@pytest.mark.parametrize(("first", "separator"), [("sep=;", ";"), ("SEP=,", ","), ('"sep=|"', "|"), ("sep=\t", "\t")])
def test_the_first_line_that_excel_reads_the_separator_from_tells_it_here_too(tmp_path, first, separator):
    rows = [["path", "latitude", "longitude"], ["a.jpg", "37.7", "-122.4"], ["", "37.7", "-122.4"]]
    text = "\r\n".join([first, *(separator.join(row) for row in rows)])
    (tmp_path / "list.csv").write_text(text, encoding="utf-8-sig", newline="")
    listing = list_named(tmp_path / "list.csv", tmp_path, 0)
    assert listing.paths.to_pylist() == ["a.jpg"]
    assert [b.source for b in listing.bad] == ["row 2"]


@pytest.mark.parametrize("before", ["", "sep=,\n"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("b,c.jpg,37.7,-122.4", "has 4 fields where the header has 3 (b,c.jpg,37.7,-122.4)"),
        ("b.jpg;37.7;-122.4", "has 1 field where"),
        ("b.jpg,1,2,3," + "x" * 1000, "has 5 fields where the header has 3 (b.jpg,1,2,3,xxx"),
    ],
)
def test_a_row_of_more_or_fewer_fields_than_the_header_is_named(tmp_path, before, wrong, said):
    row = "a.jpg,37.7,-122.4\n"
    (tmp_path / "list.csv").write_text(f"{before}path,latitude,longitude\n{row * 99_999}{wrong}\n{row}")
    with pytest.raises(JobError, match=re.escape(f"list.csv: row 100000 {said}")) as error:
        list_named(tmp_path / "list.csv", tmp_path, 0)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("latin-1", r"row 1 has 4 fields where .*\(b.jpg,1,2,�\)"), ("utf-16", "not a list of photos, CSV in UTF-8")],
)
@pytest.mark.filterwarnings("error")  # of exceptions that are only printed
def test_a_row_of_too_many_fields_in_another_encoding_is_one_line(tmp_path, encoding, said):
    (tmp_path / "list.csv").write_text("path,latitude,longitude\nb.jpg,1,2,é\n", encoding=encoding)
    with pytest.raises(JobError, match=said):
        list_named(tmp_path / "list.csv", tmp_path, 0)


def test_rows_of_a_receiver_without_a_fix_are_set_aside_and_have_no_say_in_the_zone(tmp_path):
    at = {"latitude": [0.0] * 30 + [0.0, 37.75], "longitude": [0.0] * 30 + [-122.4, -122.4]}
    listing = list_named(write_csv(tmp_path / "list.csv", path=[f"{i}.jpg" for i in range(32)], **at), tmp_path, 0)
    assert listing.places is not None
    assert (listing.paths.to_pylist(), listing.places.zones.tolist()) == (["30.jpg", "31.jpg"], [10, 10])
    assert reasons_of(listing.bad) == "30 no GPS fix"


def test_rows_without_usable_values_are_set_aside_with_their_reason(tmp_path):
    names = write_listed(tmp_path, 20)
    latitude = ["37.7"] * 20 + ["", "nan", "91", "37.7", "37.7", "abc", "37.7"]
    longitude = ["-122.4"] * 20 + ["-122.4", "-122.4", "-122.4", "-190", "10", "-122.4", "-122.4"]
    path = [*names, "a", "b", "c", "d", "e", "f", ""]
    place = write_csv(tmp_path / "list.csv", path=path, latitude=latitude, longitude=longitude)
    listing = list_named(place, tmp_path, 0)
    assert len(listing) == 20
    assert {b.source: b.reason for b in listing.bad} == {
        "a": "no coordinates", "b": "no coordinates", "f": "no coordinates", "c": "coordinates out of range",
        "d": "coordinates out of range", "e": "zone mismatch", "row 27": "no path",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_that_are_empty_in_every_column_are_left_out_and_those_behind_them_keep_their_numbers(tmp_path, kind):
    path = ["", "a.jpg", " ", "", "b.jpg", *[""] * 30]
    latitude = ["", "37.7", " ", "37.7", "37.7x", *[""] * 30]
    columns = {"path": path, "latitude": latitude, "longitude": ["" if not x.strip() else "-122.4" for x in latitude]}
    place = tmp_path / f"list.{kind}"
    if kind == "csv":
        place.write_text("\n".join(",".join(row) for row in [list(columns), *zip(*columns.values(), strict=True)]))
    else:
        pq.write_table(
            pa.table({n: [x if x.strip() else None for x in column] for n, column in columns.items()}), place
        )
    listing = list_named(place, tmp_path, 0)
    assert listing.paths.to_pylist() == ["a.jpg"]
    assert {b.source: b.reason for b in listing.bad} == {"row 4": "no path", "b.jpg": "no coordinates"}
    assert listing.found == 3


def test_a_parquet_list_of_string_views_may_have_empty_rows(tmp_path):
    texts = {"path": ["a.jpg", None], "latitude": ["37.7", None], "longitude": ["-122.4", None]}
    table = pa.table({name: pa.array(column, pa.string_view()) for name, column in texts.items()})
    pq.write_table(table, tmp_path / "list.parquet")
    listing = list_named(tmp_path / "list.parquet", tmp_path, 0)
    assert (listing.paths.to_pylist(), listing.bad) == (["a.jpg"], [])


def test_a_plane_of_ones_own_may_lie_where_no_zone_does(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(13):
        (tmp_path / "photos" / f"@{2600000 + i if i < 12 else 10**9}@-9000000@{i}@.jpg").write_bytes(jpeg(96, i))
    build(Source.of(tmp_path / "photos"), tmp_path / "out", SETTINGS, HERE)
    made = Dataset.open(tmp_path / "out")
    assert (made.manifest.utm_zone, made.classes.cell_east.tolist(), made.manifest.images) == (0, [2600000], 12)
    assert set(quarantine(tmp_path / "out").values()) == {"coordinates out of range"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,x\na,1\n", "it needs path and either east, north or"),
        ("\x00\xff\n", "list"),
        ("", "not a list of photos"),
        ("path,east,East,north\na,1,2,3\n", "has the column east twice"),
        ("path|east|north\na|1|2\n", "it needs path and either"),
        ("path,east,north\n", "none of its 0 rows names a photo"),
        ("path,east,north\na,nan,1\n,2,1\n", r"none of its 2 rows .*\(1 no path, 1 no coordinates; e\.g\. row 2: "),
        (
            "path,latitude,longitude\na,33.87 S,1\n",
            r"a: latitude=33\.87 S, longitude=1; coordinates are decimal numbers",
        ),
    ],
)
def test_a_file_that_is_no_list_is_named_in_one_line(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text, encoding="latin-1")
    with pytest.raises(JobError, match=message) as error:
        build(Source.of(tmp_path / "list.csv"), tmp_path / "out", SETTINGS, HERE)
    assert "\n" not in str(error.value)


def test_a_dry_run_over_a_list_whose_photos_lie_elsewhere_names_root(tmp_path):
    names = write_listed(tmp_path / "photos", 20)
    place = write_csv(tmp_path / "list.csv", path=names, east=[500003.0] * 20, north=[4180003.0] * 20)
    with pytest.raises(
        JobError,
        match=r"none of 20 photos that were tried can be used \(20 missing; e\.g\. IMG_\d+\.jpg: .*; --root is",
    ):
        dry_run(Source.of(place), tmp_path / "out", SETTINGS, Machinery(1))
    source = Source.of(place, tmp_path / "photos", crops=12)
    said = r"144 not a panorama; e\.g\. IMG_\d+\.jpg: 1\.00 times .*\); leave out --crops"
    with pytest.raises(JobError, match=said) as error:
        dry_run(source, tmp_path / "out", replace(SETTINGS, crops=12), Machinery(1))
    assert "--root" not in str(error.value)


def test_a_list_with_paths_of_windows_is_told_what_separates_folders(tmp_path):
    paths = [rf"photos\{name}" for name in write_listed(tmp_path / "photos", 40)]
    place = write_csv(tmp_path / "list.csv", path=paths, east=[500003.0] * 40, north=[4180003.0] * 40)
    said = r"40 missing: its path has \\, here / separates folders"
    with pytest.raises(JobError, match=said):
        dry_run(Source.of(place), tmp_path / "out", SETTINGS, Machinery(1))
    with pytest.raises(JobError, match=said.replace("40", r"\d+")):
        build(Source.of(place), tmp_path / "out", SETTINGS, HERE)


def test_a_list_of_another_zone_than_the_one_asked_for_is_not_told_of_names_and_lists(tmp_path):
    place = write_csv(tmp_path / "list.csv", path=["a.jpg"], east=[5e5], north=[4e6], zone=["32"])
    with pytest.raises(JobError, match=r"none of 1 photos has usable coordinates; e\.g\. a\.jpg: UTM zone 32[^;]*$"):
        build(Source.of(place), tmp_path / "out", replace(SETTINGS, zone=10), HERE)


def test_the_folder_that_paths_are_relative_to_is_named_where_it_is_not_there(tmp_path):
    place = write_csv(tmp_path / "list.csv", path=["a.jpg"], east=[5e5], north=[4e6])
    with pytest.raises(JobError, match=f"^--root {tmp_path}/none: no such folder$"):
        build(Source.of(place, tmp_path / "none"), tmp_path / "out", SETTINGS, HERE)


def test_a_list_takes_the_formats_that_the_page_on_own_data_names_and_a_folder_those_of_four_extensions(tmp_path):
    taken = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP"}
    refused = {"gif": "GIF", "jp2": "JPEG2000", "avif": "AVIF"}
    image = Image.open(io.BytesIO(jpeg(96, 0)))
    for extension, kind in (taken | refused).items():
        for i in range(12):
            image.save(tmp_path / f"@{500003 + i}@4180003@10@S@{extension}@.{extension}", kind)
    (tmp_path / "@500003@4180003@10@S@heic@.heic").write_bytes(b"\0\0\0\x18ftypheic")
    paths = sorted(path.name for path in tmp_path.iterdir())
    columns = {"path": paths, "east": [500003.0] * len(paths), "north": [4180003.0] * len(paths)}
    (tmp_path / "lists").mkdir()
    place = write_csv(tmp_path / "lists" / "list.csv", **columns)
    listed = build(Source.of(place, tmp_path), tmp_path / "listed", SETTINGS, replace(HERE, max_bad_share=1))
    assert (listed.manifest.images, listed.reasons) == (60, {"not an image": 37})
    found = list_photos(tmp_path, None, lambda n: None)
    assert {path.rpartition(".")[2] for path in found.paths.to_pylist()} == {"jpg", "png", "webp"}


def test_the_share_of_bad_photos_counts_rows_without_coordinates_among_all(tmp_path):
    names = write_listed(tmp_path, 40)
    place = write_csv(tmp_path / "list.csv", path=names, east=[500003.0] * 10 + [None] * 30, north=[4180003.0] * 40)
    with pytest.raises(JobError, match=r"30 of 40 .* \(30 no coordinates; e\.g\. IMG_0010\.jpg: east=, .* limit of 25"):
        build(Source.of(place), tmp_path / "out", SETTINGS, HERE)
    assert (
        build(Source.of(place), tmp_path / "out", SETTINGS, replace(HERE, max_bad_share=0.75)).manifest.quarantined
        == 30
    )


def test_a_list_may_name_what_is_not_there_or_no_file_and_nothing_hangs(tmp_path):
    names = write_listed(tmp_path, 20)
    os.mkfifo(tmp_path / "pipe.jpg")
    path = [*names, "pipe.jpg", "gone/missing.jpg", "//1/x.jpg"]
    place = write_csv(tmp_path / "list.csv", path=path, east=[500003.0] * 23, north=[4180003.0] * 23)
    summary = build(Source.of(place), tmp_path / "out", SETTINGS, HERE)
    assert summary.reasons == {"not a regular file": 1, "missing": 2}
    assert summary.manifest.images == 20


def test_a_list_may_name_objects_below_a_url_and_those_that_are_gone_are_set_aside(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in range(12):
        memory.pipe_file(f"/bucket/photos/{i}.jpg", jpeg(96, i))
    place = write_csv(
        tmp_path / "list.csv", path=[f"{i}.jpg" for i in range(13)], east=[500003.0] * 13, north=[4180003.0] * 13
    )
    source = Source.of(place, "memory://bucket/photos")
    task = next(make_plan(source.photos(None, 0), SETTINGS).tasks())
    result = write_shard(task, [source], tmp_path / "out", Resizer(64, 90), lambda *_: True)
    assert (result.images, [b.reason for b in result.bad]) == (12, ["missing"])
    memory.rm("/bucket/photos", recursive=True)
    with pytest.raises(JobError, match=r"memory://bucket/photos: cannot be read .* bring it back"):
        write_shard(task, [source], tmp_path / "out2", Resizer(64, 90), lambda *_: True)


@pytest.mark.parametrize(
    "columns",
    [
        {"path": [["a.jpg"]]},
        {"path": [b"\xff.jpg"]},
        {"latitude": [[37.7]]},
        {"latitude": [dt.datetime(2024, 1, 1)]},
        {"timestamp": [{"year": 2024}]},
    ],
)
def test_a_table_whose_columns_hold_something_else_is_one_line(tmp_path, columns):
    table = pa.table({"path": ["a.jpg"], "latitude": [37.7], "longitude": [-122.4]} | columns)
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(JobError, match=r"list\.parquet: not a list of photos") as error:
        list_named(tmp_path / "list.parquet", tmp_path, 0)
    assert "\n" not in str(error.value)
