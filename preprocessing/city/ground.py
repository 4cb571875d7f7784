"""The ground of a procedural city: road, markings, pavements, parks, and the shadows that fall on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.city.buildings import Floats
from preprocessing.city.painting import Colour, Image
from preprocessing.city.plan import PAVEMENT, Plan, Street, Weather, stream

TILE = 512
"""Side of a tile, texels."""
ASPHALT = (87, 89, 91)
_TILES_KEPT = 160


@dataclass
class Patch:
    """A square of painted ground: city position of its first texel's corner (metres), texels a metre, and the texels
    uint8 [n, n, 3], whose columns run along +x and rows along +y."""

    x: float
    y: float
    density: float
    image: Image

    @cached_property
    def half(self) -> Patch:
        """The same ground at half the density."""
        shape = (self.image.shape[1] // 2, self.image.shape[0] // 2)
        return Patch(self.x, self.y, self.density / 2, cv2.resize(self.image, shape, interpolation=cv2.INTER_AREA))


class Ground:
    """Road, markings, pavements and the shadows of buildings, put together around a camera from painted tiles."""

    def __init__(self, plan: Plan, size: int) -> None:
        self.plan = plan
        self.densities = tuple(d * size / 512 for d in (32.0, 8.0, 2.0))
        self.radii = (14.0, 44.0, 176.0)
        self.rects, self.colours = _markings(plan)
        rng = stream(plan.settings.seed, "asphalt")
        rough = cv2.resize(rng.normal(0, 5, (32, 32)).astype(np.float32), (TILE, TILE), interpolation=cv2.INTER_CUBIC)
        grain = np.clip(rough + rng.normal(0, 5, (TILE, TILE)) + 14, 0, 255).astype(np.uint8)
        self._grain = cv2.merge([grain] * 3)
        self._tile = lru_cache(_TILES_KEPT)(self._paint)

    def patches(self, x: float, y: float, weather: Weather, trees: Floats) -> list[Patch]:
        """Patches around a camera, finest first."""
        found = []
        for density, radius in zip(self.densities, self.radii, strict=True):
            patch = self._gather(x, y, density, radius)
            if weather.sun > 0:
                self._cast_shadows(patch, weather, trees)
            found.append(patch)
        return found

    def _gather(self, x: float, y: float, density: float, radius: float) -> Patch:
        """Copies the tiles around a place into one patch."""
        side = 2 * round(radius * density)
        column, row = round((x - radius) * density), round((y - radius) * density)
        image = np.empty((side, side, 3), np.uint8)
        for i in range(column // TILE, (column + side - 1) // TILE + 1):
            for j in range(row // TILE, (row + side - 1) // TILE + 1):
                tile = self._tile(density, i, j)
                x0, x1 = max(column, i * TILE), min(column + side, (i + 1) * TILE)
                y0, y1 = max(row, j * TILE), min(row + side, (j + 1) * TILE)
                piece = tile[y0 - j * TILE : y1 - j * TILE, x0 - i * TILE : x1 - i * TILE]
                image[y0 - row : y1 - row, x0 - column : x1 - column] = piece
        return Patch(column / density, row / density, density, image)

    def _paint(self, density: float, i: int, j: int) -> Image:
        image = np.empty((TILE, TILE, 3), np.uint8)
        image[:] = ASPHALT
        x, y, side = i * TILE / density, j * TILE / density, TILE / density
        rects = self.rects
        near = (rects[:, 0] < x + side) & (rects[:, 2] > x) & (rects[:, 1] < y + side) & (rects[:, 3] > y)
        if density < 3:
            near &= np.minimum(rects[:, 2] - rects[:, 0], rects[:, 3] - rects[:, 1]) > 0.3
        chosen = np.flatnonzero(near)
        corners = np.round(np.clip((rects[chosen] - (x, y, x, y)) * density, -2, TILE + 2) * 16).astype(np.int32)
        for (x0, y0, x1, y1), colour in zip(corners.tolist(), self.colours[chosen].tolist(), strict=True):
            points = np.array(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), np.int32)
            cv2.fillConvexPoly(image, points, colour, cv2.LINE_AA, 4)
        return cv2.subtract(image, self._grain)

    def _cast_shadows(self, patch: Patch, weather: Weather, trees: Floats) -> None:
        box, density = self.plan.buildings.box, patch.density
        low, high = (
            np.array((patch.x, patch.y)),
            np.array((patch.x, patch.y)) + patch.image.shape[0] / density,
        )
        length = 1 / math.tan(weather.sun_height)
        shift = np.array((-math.cos(weather.sun_angle), -math.sin(weather.sun_angle))) * length
        near = np.ones(len(box), np.bool_)
        for axis in (0, 1):
            near &= box[:, axis] + np.minimum(0, box[:, 4] * shift[axis]) < high[axis]
            near &= box[:, axis + 2] + np.maximum(0, box[:, 4] * shift[axis]) > low[axis]
        mask = np.zeros(patch.image.shape[:2], np.uint8)
        corners = box[near][:, ((0, 1), (2, 1), (2, 3), (0, 3))]
        points = np.concatenate([corners, corners + (box[near, 4:5] * shift)[:, None]], 1)
        pixels = np.ascontiguousarray(np.round((points - low) * density * 8), np.int32)
        for outline in pixels:
            cv2.fillConvexPoly(mask, cv2.convexHull(outline), 1, cv2.LINE_8, 3)
        if weather.foliage != 2:
            for x, y, height, _ in trees.tolist():
                middle = np.array((x, y)) + shift * height * 0.65
                if (middle > low - 3).all() and (middle < high + 3).all():
                    px, py = np.round((middle - low) * density).astype(int).tolist()
                    cv2.circle(mask, (px, py), max(1, round(height * 0.3 * density)), 1, -1)
        ratio = weather.ambient / (weather.ambient + weather.sun * math.sin(weather.sun_height))
        cv2.copyTo(cv2.convertScaleAbs(patch.image, alpha=ratio), mask, patch.image)


def _markings(plan: Plan) -> tuple[Floats, NDArray[np.uint8]]:
    """Rectangles float64 [n, 4] and colours uint8 [n, 3] of all that is painted on the ground, lowest first."""
    rng = stream(plan.settings.seed, "markings")
    rects: list[tuple[float, float, float, float]] = []
    colours: list[Colour] = []

    def add(x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        rects.append((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
        colours.append(colour)

    def along(street: Street, a: float, b: float, low: float, high: float, colour: Colour) -> None:
        add(*street.point(a, low), *street.point(b, high), colour)

    white, yellow = (214, 214, 208), (206, 172, 70)
    for street in plan.streets:
        end = street.high - street.low
        across = [s for s in plan.streets if s.axis != street.axis]
        for _ in range(int(end / 14)):  # repaired asphalt
            at, aside = rng.uniform(0, end), rng.uniform(-0.4, 0.4) * (street.width - 2 * PAVEMENT)
            tone = int(rng.integers(58, 112))
            along(
                street,
                at,
                at + rng.uniform(0.6, 6),
                aside,
                aside + rng.uniform(0.5, 2.4),
                (tone, tone, tone + 3),
            )
        solid = rng.random() < 0.4
        road = street.width / 2 - PAVEMENT
        inside = [(s.centre - street.low, s.width / 2) for s in across]
        bays = rng.random() < 0.5
        for at in np.arange(-120, end + 120, 6.0):
            if all(abs(at + 1.5 - centre) > half + 3 for centre, half in inside):
                along(street, at, at + (6.0 if solid else 2.6), -0.09, 0.09, yellow if solid else white)
                if bays:
                    for side in (-1, 1):
                        along(street, at, at + 0.12, side * (road - 2.1), side * road, white)
        for centre, half in inside:
            for sign in (-1, 1):
                start = centre + sign * (half - PAVEMENT + 0.6)
                for bar in np.arange(-road + 0.4, road - 0.4, 1.1):
                    along(street, start, start + sign * 2.4, bar, bar + 0.5, white)
                along(street, start + sign * 3.3, start + sign * 3.7, 0.1, sign * road, white)
    for x0, x1 in zip(plan.block_x0, plan.block_x1, strict=True):
        for y0, y1 in zip(plan.block_y0, plan.block_y1, strict=True):
            p = PAVEMENT
            add(x0 - p, y0 - p, x1 + p, y1 + p, (178, 176, 170))
            tone = int(rng.integers(132, 160))
            add(x0 - p + 0.2, y0 - p + 0.2, x1 + p - 0.2, y1 + p - 0.2, (tone, tone - 2, tone - 8))
            for at in np.arange(x0 - p, x1 + p, 2.0):
                add(at, y0 - p, at + 0.05, y0, (108, 106, 102))
                add(at, y1, at + 0.05, y1 + p, (108, 106, 102))
            for at in np.arange(y0 - p, y1 + p, 2.0):
                add(x0 - p, at, x0, at + 0.05, (108, 106, 102))
                add(x1, at, x1 + p, at + 0.05, (108, 106, 102))
            park = any(abs(px - x0) < 1e-6 and abs(py - y0) < 1e-6 for px, py, _, _ in plan.parks)
            add(x0, y0, x1, y1, (84, 112, 58) if park else (120, 116, 106))
            if park:
                middle = (y0 + y1) / 2 + float(rng.uniform(-12, 12))
                add(x0, middle - 1.5, x1, middle + 1.5, (176, 162, 132))
                add((x0 + x1) / 2 - 1.5, y0, (x0 + x1) / 2 + 1.5, y1, (176, 162, 132))
    return np.array(rects), np.array(colours, np.uint8)
