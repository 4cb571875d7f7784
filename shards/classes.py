"""Cells and groups of the map, and the class table: which cell each label of each group stands for."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import utm

from shards.console import JobError, is_systems, one_line
from shards.files import atomic_path, read_table
from shards.plane import half_of

_COLUMNS = {
    "group": np.int32,
    "label": np.int32,
    "cell_east": np.int64,
    "cell_north": np.int64,
    "images": np.int64,
}
_STEP = 1 << 20


def grid_index(metres: np.ndarray, M: int) -> np.ndarray:
    """`floor(metres / M)` exactly, int64, same shape: the quotient's rounding never moves a point over an edge."""
    out = np.empty(np.shape(metres), np.int64)
    flat = out.reshape(-1)
    for first in range(0, flat.size, _STEP):  # in steps, since 41 million photos leave no memory to waste
        part = np.ravel(metres)[first : first + _STEP]
        index = np.floor(part / M)
        index -= index * M > part
        flat[first : first + _STEP] = index
    return out


def group_of(east_index: np.ndarray, north_index: np.ndarray, N: int) -> np.ndarray:
    """The group of each cell, by its position (int64 [n]) in the grid of cells."""
    return (east_index % N) * N + north_index % N


def number_within(group: np.ndarray) -> np.ndarray:
    """The number of each entry among those of its group, int64 [n]; `group` (int [n]) ascends."""
    return np.arange(len(group)) - np.searchsorted(group, group)


@dataclass(frozen=True, eq=False)
class ClassTable:
    """All classes of a city, sorted by (group, label).

    A class is a square cell of `M` metres in UTM `zone`, named by its lower-left corner (`cell_east`, `cell_north`,
    metres); its group is `east_index * N + north_index` of the cell's position within a block of N x N cells.
    All columns have shape [C]. `images` counts the photos of a class: those planned, and in a
    finished data set those in its shards (0 is never drawn). `southern`: northings
    are those of the southern hemisphere (False too where nothing tells).
    """

    M: int
    N: int
    zone: int
    group: np.ndarray
    label: np.ndarray
    cell_east: np.ndarray
    cell_north: np.ndarray
    images: np.ndarray
    southern: bool = False

    def __len__(self) -> int:
        return len(self.group)

    @cached_property
    def groups(self) -> list[int]:
        """Numbers of the groups that have classes, ascending."""
        return [int(g) for g in np.unique(self.group)]

    @property
    def center_east(self) -> np.ndarray:
        """Easting that each class predicts, float64 [C]: the cell's middle (`M // 2`, as the reference has it)."""
        return (self.cell_east + self.M // 2).astype(np.float64)

    @property
    def center_north(self) -> np.ndarray:
        """Northing that each class predicts, float64 [C]."""
        return (self.cell_north + self.M // 2).astype(np.float64)

    def centers(self) -> np.ndarray:
        """Easting and northing of the classes' predictions in metres, float64 [C, 2]."""
        return np.stack([self.center_east, self.center_north], axis=1)

    def of_group(self, group: int) -> "ClassTable":
        """The classes of one group; row i has label i."""
        return self.take(np.flatnonzero(self.group == group))

    def count(self, group: int) -> int:
        """How many classes a group has."""
        return int(np.count_nonzero(self.group == group))

    def shares_grid(self, other: "ClassTable") -> bool:
        """Whether cells of both that have the same corner are the same square of the map."""
        return (self.M, self.zone, self.southern) == (other.M, other.zone, other.southern)

    def take(self, rows: np.ndarray) -> "ClassTable":
        """The classes in `rows` (int [K]), in that order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _COLUMNS})

    def fingerprint(self) -> str:
        """A hash of which cell has which label (not of the image counts): equal for interchangeable class maps."""
        digest = hashlib.sha256(f"{self.M} {self.N} {self.zone}".encode())
        for name in ("group", "label", "cell_east", "cell_north"):
            digest.update(np.ascontiguousarray(getattr(self, name), "<i8").tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path | str) -> None:
        """Write the table as Parquet, whole or not at all."""
        columns = {name: getattr(self, name).astype(kind) for name, kind in _COLUMNS.items()}
        columns["center_east"], columns["center_north"] = self.center_east, self.center_north
        facts = {"M": str(self.M), "N": str(self.N), "zone": str(self.zone), "crs": self.crs}
        if self.southern:
            facts["southern"] = "1"
        table = pa.table(columns).replace_schema_metadata(facts)
        with atomic_path(path) as partial:
            pq.write_table(table, partial)

    def to_latlon(self, east: np.ndarray, north: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Degrees (WGS84) of points in the plane of the classes (float64 [Q], metres); NaN where it has no UTM zone."""
        if not self.zone or not len(east):
            nowhere = np.full(len(east), np.nan)
            return nowhere, nowhere
        latitude, longitude = utm.to_latlon(east, north, self.zone, northern=not self.southern, strict=False)
        return np.asarray(latitude), np.asarray(longitude)

    @property
    def crs(self) -> str:
        """The coordinate system in words."""
        half = "south" if self.southern else "north"
        return f"UTM zone {self.zone} {half}, metres" if self.zone else "metres in one plane (no UTM zone in the names)"

    @property
    def place(self) -> str:
        """Where the classes lie, in words: coordinate system, extent, and the degrees of their middle where known."""
        east, north = (axis[None].astype(float) for axis in np.median(self.centers(), axis=0))
        (latitude,), (longitude,) = self.to_latlon(east, north)
        wide, high = (float(np.ptp(axis) + self.M) / 1000 for axis in (self.cell_east, self.cell_north))
        around = f", around latitude {latitude:.3f}, longitude {longitude:.3f}" if self.zone else ""
        return f"{self.crs}; {wide:,.2f} km west to east, {high:,.2f} km south to north{around}"

    @staticmethod
    def load(path: Path | str) -> "ClassTable":
        """Read a table that `save` wrote; raises `JobError` where it is missing or something else."""
        try:
            table = read_table(path)
            M, N, zone = (int(table.schema.metadata[name]) for name in (b"M", b"N", b"zone"))
            southern = table.schema.metadata.get(b"southern") == b"1"
            columns = {name: table[name].to_numpy().astype(kind) for name, kind in _COLUMNS.items()}
            southern |= bool(zone and len(table) and half_of(columns["cell_north"]))
        except FileNotFoundError:
            raise JobError(f"{path}: no such class table") from None
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            if is_systems(error):
                raise
            raise JobError(f"{path}: not a class table ({one_line(error)})") from None
        return ClassTable(M, N, zone, **columns, southern=southern)
