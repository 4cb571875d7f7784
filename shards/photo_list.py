"""Photos named by a list, CSV or Parquet: a path and a place in each row.

Columns: `path`, and either `east`, `north` (UTM metres; `zone` as 10, 10S or an EPSG code where it is known) or
`latitude`, `longitude` (degrees, WGS84); `heading` (degrees clockwise from north) and `timestamp` where there are any.
Fields of a CSV are separated by commas, or by semicolons or tabs as spreadsheets write them; then 47,37 is a number
too.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
import utm

from shards.console import JobError, describe_os_error, format_count, one_line, printable
from shards.names import string_bytes
from shards.plane import Places, half_of, in_plane, on_map, zone_of, zones_apart
from shards.store import is_url

_LIST_EXTENSIONS = (".csv", ".parquet")
_COLUMNS = ("path", "east", "north", "zone", "latitude", "longitude", "heading", "timestamp")
_NUMBERS = ("east", "north", "latitude", "longitude", "heading")
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
# 10, 10S (a band), 32610 or EPSG:25832; tables that read whole numbers with gaps as decimal ones write 10.0.
_ZONE = re.compile(r"(EPSG:\s*)?(\d{1,5})(?:[.,]0+)?\s*([C-HJ-NP-X]?)", re.IGNORECASE | re.ASCII)
_ZONE_OF_CODE = {
    before + zone: (zone, southern)
    for before, zones, southern in (
        (32600, range(1, 61), False),  # WGS 84
        (32700, range(1, 61), True),
        (25800, range(28, 39), False),  # ETRS89
        (26900, range(1, 24), False),  # NAD83
        (28300, range(46, 60), True),  # GDA94
        (7800, range(46, 60), True),  # GDA2020
    )
    for zone in zones
}
_BANDS = "CDEFGHJKLMNPQRSTUVWX"  # of 8 degrees of latitude each, from 80 degrees south
_LONGEST_HEAD = 1 << 16
_SEPARATOR = re.compile(r'"?sep=([\t ,;:|])"?', re.IGNORECASE)
_SHOWN = 100  # characters of a row

_FORMS = {
    "no coordinates": "coordinates are decimal numbers, negative in the south and west",
    "no UTM zone": "a zone is written 10, 10S or as its EPSG code: 326.. (327.. in the south), 258.. (ETRS89), 269.. "
    "(NAD83), 283.. (GDA94) or 78.. (GDA2020)",
}

BACKSLASHES = "its path has \\, here / separates folders"
"""What may be wrong with a photo that a list names by a path of Windows and that is not there."""

GIVE_A_LIST = "where names say nothing, give a list with path, latitude, longitude (docs/own-data.md)"
"""The way out where no photo of a folder has coordinates in its name."""


@dataclass(frozen=True)
class PhotoList:
    """The n rows of a list, without those that are empty: `paths` (large_string [n], "" where a row has none),
    `places`, for each reason why a row is unusable the rows that it holds for (bool [n]; in no row do two), the `table`
    as it was read, and the `numbers` of the rows in the file, of which the first after the header is 1."""

    paths: pa.Array
    places: Places
    unusable: dict[str, np.ndarray]
    table: pa.Table
    numbers: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def values(self, row: int, reason: str) -> str:
        """What a row that is unusable for a `reason` says of its photo, and how that is written, in words."""
        columns = (name for name in self.table.column_names if name != "path")
        said = ", ".join(f"{name}={self.table[name][row].as_py()}" for name in columns)
        return printable(f"{said}; {_FORMS[reason]}" if reason in _FORMS else said)


@dataclass(frozen=True)
class _CsvForm:
    """What separates the fields of a CSV file, and how many lines come before its header."""

    separator: str
    before: int

    @staticmethod
    def of(file: Path) -> _CsvForm:
        """By the first line, which may be there for Excel to read the separator from."""
        with file.open("rb") as opened:
            head = opened.readline(_LONGEST_HEAD).decode("utf-8-sig", "replace")
        if told := _SEPARATOR.fullmatch(head.rstrip("\r\n")):
            return _CsvForm(told[1], 1)
        return _CsvForm(max(",;\t", key=head.count), 0)

    def read_options(self, *, use_threads: bool = True, encoding: str = "utf8") -> csv.ReadOptions:
        return csv.ReadOptions(skip_rows=self.before, use_threads=use_threads, encoding=encoding)

    def parse_options(self, on_uneven: Callable[[csv.InvalidRow], str] | None = None) -> csv.ParseOptions:
        return csv.ParseOptions(delimiter=self.separator, newlines_in_values=True, invalid_row_handler=on_uneven)


class PathColumn:
    """Gathers paths into one Arrow array without a second copy of them: 41 million take 4 GB."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = [np.zeros(1, np.int64)]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, paths: pa.Array) -> None:
        """Append a large_string array."""
        ends, data = string_bytes(paths)
        self._count += len(paths)
        if len(paths):
            self._ends.append(ends[1:] - ends[0] + len(self._data))
            self._data += memoryview(data)[ends[0] : ends[-1]]

    def array(self) -> pa.Array:
        """All paths, large_string [n]; nothing may be added afterwards."""
        ends = np.concatenate(self._ends)
        return pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(self._data))


def is_list(place: Path | str) -> bool:
    """Whether a path, which is no URL, is that of a list of photos, by its extension."""
    name = os.fspath(place).lower()
    return name.endswith(_LIST_EXTENSIONS) and not is_url(name) and not os.path.isdir(place)


def read_list(file: Path, zone: int, *, southern: bool | None = None) -> PhotoList:
    """The rows of a list.

    `zone`: the UTM zone that latitudes and longitudes are converted to; 0 means the one that most of them are in.
    `southern`: the hemisphere of their plane, and of metres whose zone has no band; None means the one that most of
    them are in. Raises `JobError` where the list cannot be read, or has several zones in unknown hemispheres.
    """
    table = _read(file)
    try:
        return _rows(table, zone, southern)
    except JobError as error:
        raise JobError(f"{file}: {error}") from None
    except pa.ArrowException as error:  # Parquet holds columns of any type
        raise _no_list(file, error) from None


def _rows(table: pa.Table, zone: int, southern: bool | None) -> PhotoList:
    paths = _paths(table)
    filled = _filled(table, paths)
    numbers: Sequence[int] | np.ndarray = range(1, 1 + len(table))
    if not filled.all():
        kept = pa.array(filled)
        table, paths, numbers = table.filter(kept), paths.filter(kept), 1 + np.flatnonzero(filled)
    empty = np.asarray(pc.equal(pc.binary_length(paths), 0))
    if "east" in table.column_names:
        places, unusable = _from_metres(table, zone, southern)
    else:
        places, unusable = _from_degrees(table, zone, southern)
    places.east[empty] = np.nan
    places.heading = _numbers(table, "heading").astype(np.float32)
    places.timestamp = _text(table, "timestamp")
    reasons = {"no path": empty} | {reason: rows & ~empty for reason, rows in unusable.items()}
    return PhotoList(paths, places, reasons, table, numbers)


def _filled(table: pa.Table, paths: pa.Array) -> np.ndarray:
    """Whether a row says anything, bool [n]: spreadsheets write rows of empty fields behind the last."""
    filled = np.asarray(pc.greater(pc.binary_length(paths), 0))
    rows = np.flatnonzero(~filled)
    for name in table.column_names if len(rows) else ():
        if name != "path":
            text = pc.utf8_trim_whitespace(_text(table.take(pa.array(rows)), name))
            filled[rows] |= np.asarray(pc.greater(pc.binary_length(text), 0))
    return filled


def _read(file: Path) -> pa.Table:
    form = None
    try:
        if file.suffix.lower() == ".parquet":
            wanted = _wanted(file, pq.read_schema(file).names)
            return _without_views(pq.read_table(file, columns=list(wanted)).rename_columns(list(wanted.values())))
        form = _CsvForm.of(file)
        return _read_csv(file, form)
    except OSError as error:
        raise JobError(f"cannot read the list: {describe_os_error(error)}") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise (form and _uneven(file, form)) or _no_list(file, error) from None


def _without_views(table: pa.Table) -> pa.Table:
    """The same table; of views of texts, which some programs write, Arrow cannot take rows."""
    for i, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type) or pa.types.is_binary_view(field.type):
            table = table.set_column(i, field.name, table[i].cast(pa.large_string()))
    return table


def _read_csv(file: Path, form: _CsvForm) -> pa.Table:
    with csv.open_csv(file, read_options=form.read_options(), parse_options=form.parse_options()) as reader:
        wanted = _wanted(file, reader.schema.names)
    table = csv.read_csv(
        file,
        read_options=form.read_options(),
        parse_options=form.parse_options(),
        convert_options=csv.ConvertOptions(
            include_columns=list(wanted),
            column_types=dict.fromkeys(wanted, pa.string()),
            strings_can_be_null=False,
        ),
    ).rename_columns(list(wanted.values()))
    return table if form.separator == "," else _with_decimal_points(table)


def _uneven(file: Path, form: _CsvForm) -> JobError | None:
    """What to say of the first row of a CSV that has more or fewer fields than its header; None where none does, or
    it is UTF-16."""
    found: list[csv.InvalidRow] = []

    def note(row: csv.InvalidRow) -> str:
        found.append(row)
        return "error"

    with suppress(pa.ArrowException):  # as Latin-1: `note` is not told of a row that is no UTF-8
        csv.read_csv(file, form.read_options(use_threads=False, encoding="latin-1"), form.parse_options(note))
    if not found or "\0" in found[0].text:
        return None
    row = found[0]
    text = row.text.encode("latin-1").decode("utf-8", "replace")
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return JobError(
        f"{file}: row {row.number - 1 - form.before} has {format_count(row.actual_columns, 'field')} where the header "
        f"has {row.expected_columns} ({printable(text)}); quote fields that hold the separator"
    )


def _no_list(file: Path, error: Exception) -> JobError:
    return JobError(f"{file}: not a list of photos, CSV in UTF-8 or Parquet ({printable(one_line(error))})")


def _with_decimal_points(table: pa.Table) -> pa.Table:
    """The same table, its decimal commas as points."""
    for i, name in enumerate(table.column_names):
        if name in _NUMBERS:
            table = table.set_column(i, name, pc.replace_substring_regex(table[name], r"^([^,]*),([^,]*)$", r"\1.\2"))
    return table


def _wanted(file: Path, names: list[str]) -> dict[str, str]:
    """The columns that are used, by their names in the file; raises `JobError` where one that is needed is missing, or
    one that is used is there twice."""
    found = Counter(n.strip().lower() for n in names)
    twice = [name for name in _COLUMNS if found[name] > 1]
    if twice:
        raise JobError(f"{file}: has the column {twice[0]} twice; leave one of them")
    if "path" not in found or not ({"east", "north"} <= set(found) or {"latitude", "longitude"} <= set(found)):
        raise JobError(
            f"{file}: has the columns {', '.join(map(printable, names))}; it needs path and either east, north or "
            "latitude, longitude"
        )
    return {n: n.strip().lower() for n in names if n.strip().lower() in _COLUMNS}


def _paths(table: pa.Table) -> pa.Array:
    """The paths as one array, each with at most one leading slash (two mark a photo of a later source)."""
    column = PathColumn()
    for chunk in table["path"].chunks:
        text = pc.fill_null(chunk.cast(pa.large_string()), "")
        column.add(pc.replace_substring_regex(text, r"^\s+$|^/+(/)", r"\1"))
    return column.array()


def _from_metres(table: pa.Table, zone: int, asked: bool | None) -> tuple[Places, dict[str, np.ndarray]]:
    east, north = _numbers(table, "east"), _numbers(table, "north")
    missing = ~(np.isfinite(east) & np.isfinite(north))
    zones, southern = np.full(len(table), zone, np.int8), np.zeros(len(table), bool)
    other_band = np.zeros(len(table), bool)
    if "zone" in table.column_names:
        text = _text(table, "zone").dictionary_encode()
        parsed = np.array([_parse_zone(zone) for zone in text.dictionary.to_pylist()], np.int8).reshape(-1, 3)
        numbers, halves, bands = parsed.T[:, np.asarray(text.indices)]
        known, told = numbers > 0, halves >= 0
        zones, southern = np.maximum(numbers, 0), halves == 1
        other_band = known & ~missing & ~_in_band(north, bands)
        usable = known & ~missing & ~other_band
        southern[~told] = _half(north[usable], zones[usable], southern[usable & told], asked)
        unknown = (numbers < 0) & ~missing
    else:
        unknown = np.zeros(len(table), bool)
    outside = ~missing & ~unknown & ~in_plane(east, north, zoned=zones != 0)
    other_band &= ~outside
    east[outside | unknown | missing | other_band] = np.nan
    reasons = {"no coordinates": missing, "coordinates out of range": outside, "no UTM zone": unknown}
    return Places(east, north, zones, southern), reasons | {"northing of another band of latitude": other_band}


def _parse_zone(text: str) -> tuple[int, int, int]:
    """The number of a zone (0 where there is no text, -1 where it is none), its hemisphere (1: southern) and its band
    in the alphabet of bands, both -1 where they are not told."""
    match = _ZONE.fullmatch(text.strip())
    if match is None:
        return -1 if text.strip() else 0, -1, -1
    code, digits, letter = match.groups()
    band = _BANDS.index(letter.upper()) if letter else -1
    if not code and len(digits) <= 2:
        number = int(digits) if 1 <= int(digits) <= 60 else -1
        return number, int(band < _BANDS.index("N")) if letter else -1, band
    number, southern = _ZONE_OF_CODE.get(int(digits), (-1, False))
    return number, int(southern), band


def _half(north: np.ndarray, zones: np.ndarray, told: np.ndarray, asked: bool | None) -> bool:
    """Whether rows whose zone is a mere number are southern: as is asked for, as most rows are that tell, as northings
    tell, else not. All arrays are of rows with a zone, `told` of those that tell."""
    if asked is not None:
        return asked
    if len(told):
        return bool(np.count_nonzero(told) * 2 > len(told))
    southern = half_of(north) if len(north) else False
    if southern is None and len(np.unique(zones)) > 1:
        raise JobError(
            "the zones are mere numbers, and north or south is needed to bring several into one plane: write the zone "
            "with its band (10S) or as an EPSG code (32610 north, 32710 south)"
        )
    return bool(southern)


def _in_band(north: np.ndarray, bands: np.ndarray) -> np.ndarray:
    """Whether northings are those of their band of latitude (its place in the alphabet of bands, -1: unknown), give or
    take a band. Near the equator, where they may be counted from either side, all are."""
    south = 8.0 * bands - 80.0
    origin = np.where(south < 0, 1e7, 0.0)
    fits = (north >= (south - 8) * 111e3 + origin) & (north <= (south + 20) * 111e3 + origin)
    return fits | (bands < 0) | (abs(south + 4) < 16)


def _from_degrees(table: pa.Table, zone: int, southern: bool | None) -> tuple[Places, dict[str, np.ndarray]]:
    """One zone and one hemisphere's plane for all, so that no border of zones runs through a city."""
    latitude, longitude = _numbers(table, "latitude"), _numbers(table, "longitude")
    missing = ~(np.isfinite(latitude) & np.isfinite(longitude))
    no_fix = (latitude == 0) & (longitude == 0)  # what receivers write that do not know where they are
    inside = on_map(latitude, longitude)
    good = inside & ~no_fix
    east, north = np.full((2, len(table)), np.nan)
    zones = np.zeros(len(table), np.int8)
    far = np.zeros(len(table), bool)
    if good.any():
        own = zone_of(latitude[good], longitude[good])
        zone = zone or int(np.argmax(np.bincount(own)))
        far[good] = zones_apart(own, zone) > 1
        good &= ~far
        if good.any():
            east[good], north[good], _, _ = utm.from_latlon(
                latitude[good],
                longitude[good],
                force_zone_number=zone,
                force_northern=bool(np.median(latitude[good]) >= 0) if southern is None else not southern,
            )
            zones[good] = zone
    reasons = {
        "no coordinates": missing,
        "no GPS fix": no_fix,
        "coordinates out of range": ~missing & ~inside,
        "zone mismatch": far,
    }
    return Places(east, north, zones, latitude < 0), reasons


def _text(table: pa.Table, name: str) -> pa.Array:
    """A column as strings; empty where a field or the column is missing."""
    if name not in table.column_names:
        return pa.array([""] * len(table), pa.string())
    return _whole(pc.fill_null(table[name].cast(pa.string()), ""))


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64 [n]; NaN where a field is no number or the column is missing."""
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    column = table[name]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.if_else(pc.match_substring_regex(column, _NUMBER), pc.utf8_trim_whitespace(column), None)
    return np.array(_whole(pc.fill_null(column.cast(pa.float64()), np.nan)))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
