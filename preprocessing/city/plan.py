"""The plan of a procedural city: streets, buildings, trees, drives of the camera car, and queries.

Everything is a function of `CitySettings`. Lengths are metres in the city's own frame (x along one street direction,
y along the other, origin in the middle of the city); `Plan.to_utm` turns that frame into UTM eastings and northings.
Angles are radians, counter-clockwise from +x, unless a name says `heading` (degrees, clockwise from north).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from preprocessing.city.buildings import cast, place_buildings
from shards.console import JobError, check_ranges

FIELD_OF_VIEW = 65.0
"""Horizontal field of view of every photo, degrees."""
ZONE, BAND = 10, "S"
ORIGIN_EAST, ORIGIN_NORTH = 549_130.0, 4_178_270.0
"""UTM position of the city's middle (San Francisco, zone 10 S)."""
CELL = 20
"""Side of the cells that queries are checked against, metres (the default M of the partition)."""
MIN_PHOTOS_PER_CELL = 10
_TRIES_A_QUERY = 1000  # some 10 are usual
PAVEMENT = 3.0
CAMERA_HEIGHT = 2.5
OVERRUN = 22.0
"""How far the car drives past the outermost crossings, metres."""


@dataclass(frozen=True)
class CitySettings:
    """What a city's photos depend on; two runs with equal settings write the same bytes.

    Raises `WrongArguments` for a value that no city can have.
    """

    seed: int = 0
    """Number that decides everything about the city."""
    blocks: int = 3
    """Blocks along each side of the city; a block and its street are about 90 m. 3 give some 130 cells."""
    size: int = 512
    """Width and height of a photo, pixels; 64 or more."""
    years: int = 3
    """Years in which the camera car drove every street; val and test queries come from two later ones."""
    headings: int = 6
    """Photos from one stop of the car, evenly around; each sees 65 degrees."""
    step: float = 5.0
    """Way between two stops, metres."""
    val_queries: int = 250
    """Photos in val/queries."""
    test_queries: int = 500
    """Photos in test/queries."""
    quality: int = 90
    """JPEG quality, 1 to 100."""

    def __post_init__(self) -> None:
        check_ranges(
            self, seed=(0, 2**62), blocks=(1, 60), size=(64, 2048), years=(1, 40), headings=(1, 36), step=(1, 20),
            val_queries=(0, 1_000_000), test_queries=(0, 1_000_000), quality=(1, 100),
        )  # fmt: skip


def stream(seed: int, *path: int | str) -> np.random.Generator:
    """A random generator that depends on the seed and the path alone, not on what was drawn before."""
    words = [int.from_bytes(p.encode()[:8], "little") if isinstance(p, str) else int(p) for p in path]
    return np.random.default_rng([seed, *words])


@dataclass(frozen=True)
class Street:
    """A straight street: `axis` 0 runs along x, 1 along y; `centre` is its fixed coordinate; `low`, `high` its ends."""

    index: int
    axis: int
    centre: float
    width: float
    low: float
    high: float

    def point(self, along: float, aside: float) -> tuple[float, float]:
        """City coordinates `along` the street (metres from its low end), `aside` of its centre line."""
        run, cross = self.low + along, self.centre + aside
        return (run, cross) if self.axis == 0 else (cross, run)


@dataclass(frozen=True)
class Weather:
    """Light and season that photos of one drive (or one query) share."""

    year: int
    month: int
    sky: int  # 0 clear, 1 scattered cloud, 2 broken cloud, 3 overcast, 4 haze
    sun_angle: float  # radians in the city frame
    sun_height: float  # radians over the horizon
    sun: float  # strength of direct light; 0 when overcast
    ambient: float
    haze: float  # metres until contrast falls to 1/e
    tint: tuple[float, float, float]  # RGB gains of the light
    foliage: int  # 0 summer, 1 autumn, 2 bare, 3 spring


@dataclass(frozen=True)
class Panorama:
    """A stop of the camera (or a query's camera): one place and moment, seen in one or several headings."""

    index: int
    split: str  # "train", "val" or "test"
    year: int
    drive: int
    x: float
    y: float
    height: float
    headings: tuple[float, ...]
    pano_id: str


def season_of(month: int) -> int:
    """Foliage (0 summer, 1 autumn, 2 bare, 3 spring) of a month 1 to 12."""
    return (2, 2, 3, 3, 3, 0, 0, 0, 1, 1, 1, 2)[month - 1]


class Plan:
    """The whole city of some settings: cheap to make (a fraction of a second), the same in every process."""

    def __init__(self, settings: CitySettings) -> None:
        self.settings = settings
        rng = stream(settings.seed, "layout")
        count = settings.blocks + 2  # one ring of blocks that is seen but not driven around
        self.rotation = math.radians(float(rng.uniform(12, 33)) * (1 if rng.random() < 0.5 else -1))
        spans = []
        for _ in range(2):
            blocks = rng.uniform(60, 86, count)
            widths = rng.uniform(13.5, 20.0, count - 1)
            edges = np.concatenate([[0.0], np.cumsum(np.stack([blocks, np.append(widths, 0)], 1).ravel())])[:-1]
            edges = edges - (edges[1] + edges[-2]) / 2
            spans.append((edges[0::2], edges[1::2]))  # low and high edges of the blocks of this axis
        (self.block_x0, self.block_x1), (self.block_y0, self.block_y1) = spans
        self.streets = self._streets()
        columns = list(zip(self.block_x0, self.block_x1, strict=True))
        rows = list(zip(self.block_y0, self.block_y1, strict=True))
        self.buildings, self.parks = place_buildings(columns, rows, stream(settings.seed, "lots"))
        self._plant(stream(settings.seed, "trees"))

    def _streets(self) -> list[Street]:
        centre_x = (self.block_x1[:-1] + self.block_x0[1:]) / 2
        centre_y = (self.block_y1[:-1] + self.block_y0[1:]) / 2
        width_x = self.block_x0[1:] - self.block_x1[:-1]
        width_y = self.block_y0[1:] - self.block_y1[:-1]
        streets: list[Street] = []
        for axis, (centres, widths, across) in enumerate(
            ((centre_y, width_y, centre_x), (centre_x, width_x, centre_y))
        ):
            for centre, width in zip(centres, widths, strict=True):
                low, high = float(across[0]) - OVERRUN, float(across[-1]) + OVERRUN
                streets.append(Street(len(streets), axis, float(centre), float(width), low, high))
        return streets

    def _plant(self, rng: np.random.Generator) -> None:
        """Trees float64 [k, 4] (x, y, height, shape) and lamp posts float64 [k, 2], at fixed places for all years."""
        trees: list[tuple[float, float, float, float]] = []
        lamps: list[tuple[float, float]] = []
        for street in self.streets:
            across = [s for s in self.streets if s.axis != street.axis]
            for side in (-1, 1):
                kerb = side * (street.width / 2 - PAVEMENT + 0.6)
                spacing, shape = float(rng.choice([9.0, 14.0, 22.0, 60.0])), int(rng.integers(0, 6))
                for kind, gap in (("tree", spacing), ("lamp", 27.0)):
                    along = -45.0 + float(rng.uniform(0, gap))
                    while along < street.high - street.low + 45:
                        run = street.low + along
                        if all(abs(run - s.centre) > s.width / 2 + 1.5 for s in across):
                            x, y = street.point(along, kerb)
                            if kind == "tree":
                                own = shape if rng.random() < 0.8 else int(rng.integers(0, 6))
                                trees.append((x, y, float(rng.uniform(4.5, 8.5)), own))
                            else:
                                lamps.append((x, y))
                        along += gap * float(rng.uniform(0.8, 1.3))
        for x0, y0, x1, y1 in self.parks:
            for _ in range(26):
                x, y = rng.uniform(x0 + 2, x1 - 2), rng.uniform(y0 + 2, y1 - 2)
                trees.append((x, y, float(rng.uniform(5, 11)), int(rng.integers(0, 6))))
        self.trees = np.array(trees)
        self.lamps = np.array(lamps)

    def to_utm(self, x: float, y: float) -> tuple[float, float]:
        """Easting and northing (metres, zone 10 S) of a city position."""
        c, s = math.cos(self.rotation), math.sin(self.rotation)
        return ORIGIN_EAST + c * x - s * y, ORIGIN_NORTH + s * x + c * y

    def angle_of(self, heading: float) -> float:
        """City angle (radians) of a compass heading (degrees)."""
        return math.radians(90.0 - heading) - self.rotation

    @lru_cache(maxsize=4096)  # noqa: B019 - a process makes one plan and keeps it
    def weather(self, year: int, drive: int) -> Weather:
        """Light and season of a drive; `year` counts from 0, the val and test years follow the training years."""
        season = stream(self.settings.seed, "year", year)
        month = int(season.permutation([7, 1, 10, 4])[0]) if year >= self.settings.years else (7, 1, 10, 4)[year % 4]
        rng = stream(self.settings.seed, "weather", year, drive)
        month = int((month - 1 + rng.integers(-1, 2)) % 12) + 1
        sky = int(rng.choice(5, p=[0.3, 0.25, 0.15, 0.2, 0.1]))
        low = season_of(month) in (1, 2)
        overcast = sky >= 3
        warm = float(rng.normal(0.0, 0.05)) + (0.03 if low else 0.0) - (0.03 if overcast else 0.0)
        return Weather(
            year=self.calendar[year],
            month=month,
            sky=sky,
            sun_angle=float(rng.uniform(-math.pi, 0.0)) - self.rotation,  # from the southern half of the sky
            sun_height=math.radians(float(rng.uniform(20, 38) if low else rng.uniform(32, 65))),
            sun=0.0 if overcast else float(rng.uniform(0.45, 0.75)),
            ambient=float(rng.uniform(0.78, 0.95) if overcast else rng.uniform(0.55, 0.7)),
            haze=float(rng.uniform(110, 200) if sky == 4 else rng.uniform(260, 700)),
            tint=(1 + warm, 1 + 0.3 * float(rng.normal(0, 0.03)), 1 - warm),
            foliage=season_of(month),
        )

    @cached_property
    def calendar(self) -> tuple[int, ...]:
        """Calendar years: those of training, then the year of the val queries, then that of the test queries."""
        return tuple(2010 + 2 * i for i in range(self.settings.years + 2))

    def name_month(self, pano: Panorama) -> str:
        """The time stamp of a name, `YYYYMM`."""
        weather = self.weather(pano.year, pano.drive)
        return f"{weather.year}{weather.month:02d}"

    @cached_property
    def panoramas(self) -> list[Panorama]:
        """Every stop of the training drives, street by street and along each street, then val and test queries."""
        stops = self._stops()
        return stops + self._queries(stops)

    def _pano_id(self, index: int) -> str:
        digest = hashlib.blake2b(f"{self.settings.seed}/{index}".encode(), digest_size=16).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def _stops(self) -> list[Panorama]:
        cfg = self.settings
        turn = 360.0 / cfg.headings
        drafts = []
        for street in self.streets:
            for year in range(cfg.years):
                rng = stream(cfg.seed, "drive", year, street.index)
                lane = float(rng.uniform(0.4, 1.8)) * (1 if rng.random() < 0.5 else -1)
                drift = rng.uniform(0, 2 * math.pi)
                along, number = float(rng.uniform(0, cfg.step)), 0
                while along <= street.high - street.low:
                    aside = lane + 0.35 * math.sin(along / 17 + drift) + float(rng.normal(0, 0.12))
                    x, y = street.point(along + float(rng.normal(0, 0.2)), aside)
                    phase = turn / 2 * (number % 2)
                    headings = tuple((phase + turn * k) % 360 for k in range(cfg.headings))
                    height = CAMERA_HEIGHT + float(rng.normal(0, 0.06))
                    drafts.append((street.index, along, year, x, y, height, headings))
                    along += cfg.step
                    number += 1
        drafts.sort(key=lambda d: d[:3])
        return [
            Panorama(i, "train", year, street, x, y, height, headings, self._pano_id(i))
            for i, (street, _, year, x, y, height, headings) in enumerate(drafts)
        ]

    def _queries(self, stops: list[Panorama]) -> list[Panorama]:
        cfg = self.settings
        taken: dict[tuple[int, int], int] = {}
        for stop in stops:
            cell = self.cell_of(stop.x, stop.y)
            taken[cell] = taken.get(cell, 0) + len(stop.headings)
        track = np.array([(stop.x, stop.y) for stop in stops])
        lengths = np.array([street.high - street.low for street in self.streets])
        queries: list[Panorama] = []
        for split, year, wanted in (
            ("val", cfg.years, cfg.val_queries),
            ("test", cfg.years + 1, cfg.test_queries),
        ):
            rng = stream(cfg.seed, "queries", year)
            drafts: list[tuple[int, float, float, float, float, float]] = []
            tries = itertools.count(1)
            while len(drafts) < wanted:
                if next(tries) > _TRIES_A_QUERY * wanted:
                    raise JobError(
                        f"no room for {wanted} {split} queries in cells of {MIN_PHOTOS_PER_CELL} photos or more; "
                        "ask for fewer, or for more photos by a smaller --step, more --years or --headings"
                    )
                street = self.streets[int(rng.choice(len(lengths), p=lengths / lengths.sum()))]
                room = street.width / 2 - 1.2
                along = float(rng.uniform(0, street.high - street.low))
                x, y = street.point(along, float(rng.uniform(-room, room)))
                heading, height = float(rng.uniform(0, 360)), float(rng.uniform(1.5, 2.0))
                off_track = float(np.min(np.hypot(track[:, 0] - x, track[:, 1] - y))) > 0.8
                known = taken.get(self.cell_of(x, y), 0) >= MIN_PHOTOS_PER_CELL
                if known and off_track and self.sees_buildings(x, y, heading):
                    drafts.append((street.index, along, x, y, height, heading))
            for moment, (_, _, x, y, height, heading) in enumerate(sorted(drafts)):
                index = len(stops) + len(queries)
                queries.append(Panorama(index, split, year, moment, x, y, height, (heading,), self._pano_id(index)))
        return queries

    def cell_of(self, x: float, y: float) -> tuple[int, int]:
        """Lower-left corner (easting, northing) of the cell of a city position."""
        east, north = self.to_utm(x, y)
        return int(east // CELL * CELL), int(north // CELL * CELL)

    def sees_buildings(self, x: float, y: float, heading: float) -> bool:
        """Whether a view holds facades: half of it or more within 60 m, not too near, and no fence in front."""
        angle, half = self.angle_of(heading), math.tan(math.radians(FIELD_OF_VIEW / 2))
        slope = np.linspace(-half, half, 33)
        rays_x = math.cos(angle) + math.sin(angle) * slope
        rays_y = math.sin(angle) - math.cos(angle) * slope
        depth = cast(self.buildings.box, x, y, rays_x, rays_y)
        house = depth[:, self.buildings.kind == 0].min(axis=1)
        fence = depth[:, self.buildings.kind == 1].min(axis=1, initial=np.inf)
        seen = np.mean(house < 60) >= 0.5 and np.median(house) > 5.0
        return bool(seen and house.min() > 1.5 and fence.min() > 4.0)
