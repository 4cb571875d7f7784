"""Paint and brushes for the surfaces of a procedural city: colours, masonry, weathering, signs and lettering."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.city.plan import stream

PAINT = 32
"""Texels a metre while painting."""
Image = NDArray[np.uint8]
Colour = tuple[int, int, int]


def shade(colour: Colour | NDArray[np.float64], gain: float) -> Colour:
    """A colour brightened or darkened."""
    r, g, b = (int(min(255, max(0, c * gain))) for c in colour)
    return r, g, b


def from_hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB 0 to 255 of a hue in turns, a saturation and a value 0 to 1."""
    k = (np.array([5.0, 3.0, 1.0]) + (hue % 1.0) * 6) % 6
    r, g, b = 255 * (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return int(r), int(g), int(b)


@lru_cache(maxsize=4)
def _letters(seed: int) -> list[list[NDArray[np.float64]]]:
    """The city's alphabet: 26 signs of two or three strokes on a 3 x 5 lattice, in units of the letter's height."""
    rng = stream(seed, "letters")
    letters = []
    for _ in range(26):
        strokes = []
        for _ in range(int(rng.integers(2, 4))):
            points = rng.permutation(9)[: int(rng.integers(2, 5))]
            strokes.append(np.stack([points % 3 * 0.28, points // 3 * 0.5], 1))
        letters.append(strokes)
    return letters


def write(canvas: Image, seed: int, rng: np.random.Generator, box: tuple[int, int, int, int], colour: Colour) -> None:
    """Writes a random word of the city's alphabet into the pixel box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    height = (y1 - y0) * 0.62
    room = int((x1 - x0) / max(height * 0.85, 1))
    if room < 1 or height < 4:
        return
    length = min(room, int(rng.integers(3, 10)))
    x = x0 + ((x1 - x0) - length * height * 0.85) / 2
    top = y0 + (y1 - y0) * 0.19
    thick = max(1, round(height * 0.14))
    for letter in rng.integers(0, 26, length):
        for stroke in _letters(seed)[letter]:
            points = np.round((stroke * height + (x, top)) * 8).astype(np.int32)
            cv2.polylines(canvas, [points], False, colour, thick, cv2.LINE_AA, 3)
        x += height * 0.85


def emblem(canvas: Image, rng: np.random.Generator, x: float, y: float, radius: float, colour: Colour) -> None:
    """Draws one of several simple signs (disc, ring, star, cross, arrow, zigzag) around a pixel."""
    kind = int(rng.integers(0, 6))
    centre = (round(x), round(y))
    if kind == 0:
        cv2.circle(canvas, centre, round(radius), colour, -1, cv2.LINE_AA)
    elif kind == 1:
        cv2.circle(canvas, centre, round(radius * 0.8), colour, max(2, round(radius * 0.35)), cv2.LINE_AA)
    else:
        points = {2: 5, 3: 4, 4: 3, 5: 7}[kind]
        turn = np.arange(2 * points) * np.pi / points + rng.uniform(0, 1)
        reach = np.where(np.arange(2 * points) % 2, radius * rng.uniform(0.3, 0.8), radius)
        star = np.stack([x + np.cos(turn) * reach, y + np.sin(turn) * reach], 1)
        cv2.fillPoly(canvas, [np.round(star).astype(np.int32)], colour, cv2.LINE_AA)


@lru_cache(maxsize=64)
def grain(index: int) -> NDArray[np.int16]:
    """A patch of weathering [1024, 1024]: blotches of several sizes plus fine grain, about -25 to 25."""
    rng = np.random.default_rng(1000 + index)
    total = np.zeros((1024, 1024), np.float32)
    for cells, strength in ((6, 7.0), (24, 5.0), (128, 3.0)):
        coarse = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        total += cv2.resize(coarse, (1024, 1024), interpolation=cv2.INTER_CUBIC)
    total += rng.normal(0, 2.5, total.shape)
    return total.astype(np.int16)


def courses(shape: tuple[int, int], rng: np.random.Generator, high: int, long: int, spread: float) -> NDArray[np.int16]:
    """Brightness of masonry [rows, columns]: courses `high` and stones `long` pixels, staggered, with dark joints."""
    rows, columns = shape
    joint = np.int16(-spread * 1.6 - 8)
    tones = rng.normal(0, spread, (rows // high + 1, columns // long + 2)).astype(np.int16)
    stones = np.repeat(tones, long, axis=1)
    stones[:, ::long] = joint
    stones[::2, :columns] = stones[::2, long // 2 : long // 2 + columns]
    wall = np.repeat(stones[:, :columns], high, axis=0)[:rows]
    wall[::high] = joint
    return wall


def lighten(canvas: Image, brightness: NDArray[np.int16]) -> None:
    """Adds a brightness (broadcast to [rows, columns]) to all channels of a canvas [rows, columns, 3], in place."""
    layer = np.ascontiguousarray(np.broadcast_to(brightness, canvas.shape[:2]))
    cv2.add(canvas, cv2.merge([layer] * 3), dst=canvas, dtype=cv2.CV_8U)


def weather(canvas: Image, kind: int) -> None:
    """Blotches and grain all over a canvas, and dirt near the ground, in place."""
    rows, columns = canvas.shape[:2]
    dirt = (14 * np.exp(np.arange(1 - rows, 1) / (1.2 * PAINT))).astype(np.int16)[:, None]
    patch = grain(kind)
    for x in range(0, columns, patch.shape[1]):
        part = canvas[:, x : x + patch.shape[1]]
        lighten(part, np.resize(patch, (rows, patch.shape[1]))[:, : part.shape[1]] - dirt)


def paint_fence(rng: np.random.Generator, width: float, height: float) -> Image:
    """A wall or fence around a gap between houses, `width` by `height` metres, with graffiti and bills."""
    shape = (round(height * PAINT), max(8, round(width * PAINT)), 3)
    canvas = np.empty(shape, np.uint8)
    canvas[:] = from_hsv(float(rng.random()), float(rng.uniform(0.05, 0.5)), float(rng.uniform(0.3, 0.75)))
    if rng.random() < 0.5:
        lighten(canvas, courses(canvas.shape[:2], rng, 6, 14, 9))
    else:
        lighten(canvas, np.repeat(rng.normal(0, 12, (1, shape[1] // 6 + 1)), 6, 1)[:, : shape[1]].astype(np.int16))
    for _ in range(int(rng.integers(1, 6)) if width > 2 else 0):
        x, y = rng.uniform(0, shape[1]), rng.uniform(shape[0] * 0.3, shape[0] * 0.9)
        emblem(canvas, rng, x, y, rng.uniform(8, 24), from_hsv(rng.random(), 0.8, rng.uniform(0.4, 1)))
    weather(canvas, int(rng.integers(0, 4)))
    return canvas


class Wall:
    """The picture of a wall, drawn in metres: x from its left edge, z over the ground."""

    def __init__(self, canvas: Image) -> None:
        self.canvas = canvas

    def row(self, z: float) -> int:
        """Pixel row of a height."""
        return round(self.canvas.shape[0] - z * PAINT)

    def rect(self, x0: float, z0: float, x1: float, z1: float, colour: Colour) -> None:
        """Fill a rectangle."""
        a, b, c, d = round(x0 * PAINT), round(x1 * PAINT), self.row(z1), self.row(z0)
        if b > a and d > c:
            cv2.rectangle(self.canvas, (a, c), (b - 1, d - 1), colour, -1)
