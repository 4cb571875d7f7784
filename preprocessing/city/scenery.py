"""What stands around the facades of a procedural city: sky and far hills, trees, lamp posts, people and cars."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np

from preprocessing.city.buildings import Floats
from preprocessing.city.painting import Colour, Image, from_hsv, shade
from preprocessing.city.plan import PAVEMENT, Panorama, Plan, Street, stream

SKY_COLOURS: tuple[tuple[Colour, Colour], ...] = (
    ((88, 134, 200), (196, 216, 236)),
    ((96, 142, 202), (204, 220, 234)),
    ((112, 146, 190), (206, 214, 222)),
    ((176, 182, 188), (214, 216, 216)),
    ((170, 184, 196), (224, 220, 210)),
)
"""Zenith and horizon colours of each kind of sky."""


def paint_sky(seed: int, kind: int, focal: float, rows: int) -> Image:
    """A sky all around, uint8 [rows, columns, 3]: the last row is the horizon, a column is `1 / focal` radians, and
    columns run to the right, from city angle 0 clockwise; two turns, so that any view is one slice."""
    columns = round(2 * math.pi * focal)
    rng = stream(seed, "sky", kind)
    zenith, horizon = (np.array(c, np.float32) for c in SKY_COLOURS[kind])
    fall = (np.linspace(1, 0, rows, dtype=np.float32) ** 0.7)[:, None, None]
    sky = np.broadcast_to(zenith * fall + horizon * (1 - fall), (rows, columns, 3)).copy()
    cover = (0.75, 0.4, 0.12, -0.4, 0.6)[kind]
    clouds = np.zeros((rows, columns), np.float32)
    for cells, strength in ((7, 1.0), (15, 0.6), (31, 0.35), (63, 0.2)):
        noise = rng.normal(0, strength, (max(3, cells // 2), cells)).astype(np.float32)
        noise = np.tile(noise, (1, 3))
        wide = cv2.resize(noise, (3 * columns, rows), interpolation=cv2.INTER_CUBIC)
        clouds += wide[:, columns : 2 * columns]
    veil = np.clip((clouds - cover) * 1.2, 0, 1)[..., None] * (0.9 if kind < 3 else 0.35)
    bright = np.array((246, 246, 248) if kind < 3 else (232, 233, 234), np.float32)
    sky += (bright * (1 - 0.12 * np.clip(clouds, 0, 1))[..., None] - sky) * veil
    hills = stream(seed, "hills")  # the same skyline in every weather
    angle = np.arange(columns) / columns * 2 * np.pi
    ridge = np.full(columns, 0.02)
    for waves in (1, 2, 3, 5, 9):
        ridge += float(hills.uniform(0.004, 0.022)) * (1 + np.sin(angle * waves + hills.uniform(0, 6.28)))
    for centre, half, tall in zip(
        hills.uniform(0, columns, 40),
        hills.uniform(0.004, 0.014, 40),
        hills.uniform(0.03, 0.13, 40),
        strict=True,
    ):
        span = np.abs(np.arange(columns) - centre) < half * focal
        ridge = np.where(span, np.maximum(ridge, tall), ridge)
    top = rows - ridge * focal
    land = np.arange(rows)[:, None] > top[None]
    sky[land] = sky[land] * 0.2 + 0.8 * (horizon * 0.72 + np.array((4, 8, 14), np.float32))
    image = np.clip(sky, 0, 255).astype(np.uint8)
    return np.concatenate([image, image], 1)


class Sprite:
    """A flat figure that faces the camera: premultiplied RGBA uint8 [rows, columns, 4] at falling sizes."""

    def __init__(self, rgba: Image) -> None:
        image = rgba.astype(np.float32)
        image[..., :3] *= image[..., 3:] / 255
        self.levels = [image.astype(np.uint8)]
        while min(self.levels[-1].shape[:2]) > 8:
            self.levels.append(cv2.resize(self.levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.levels[0].shape[1] / self.levels[0].shape[0]


@dataclass(frozen=True)
class Figure:
    """A sprite standing in the city: foot and height, metres."""

    x: float
    y: float
    height: float
    sprite: Sprite


@lru_cache(maxsize=4)
def tree_sprites(seed: int) -> list[list[Sprite]]:
    """Sprites of six tree shapes, each in summer, autumn, winter and spring; bottom centre is the foot."""
    return [[Sprite(_paint_tree(seed, shape, foliage)) for foliage in range(4)] for shape in range(6)]


def _paint_tree(seed: int, shape: int, foliage: int) -> Image:
    rng = stream(seed, "tree", shape)
    rows, columns = 384, 288
    image = np.zeros((rows, columns, 4), np.uint8)
    bark = (*from_hsv(rng.uniform(0.05, 0.1), 0.35, rng.uniform(0.2, 0.38)), 255)

    def branch(x: float, y: float, angle: float, length: float, thick: float) -> None:
        tip = (x + math.cos(angle) * length, y - math.sin(angle) * length)
        cv2.line(
            image,
            (round(x), round(y)),
            (round(tip[0]), round(tip[1])),
            bark,
            max(1, round(thick)),
            cv2.LINE_AA,
        )
        if thick > 1.0:
            for _ in range(3):
                branch(*tip, angle + rng.normal(0, 0.5), length * rng.uniform(0.55, 0.8), thick * 0.6)

    branch(columns / 2, rows, math.pi / 2 + rng.normal(0, 0.04), rows * rng.uniform(0.24, 0.36), 11)
    hue = rng.uniform(0.22, 0.36)
    leaves = stream(seed, "leaves", shape)
    if foliage == 2:
        return image
    tone = {
        0: (hue, 0.52, 0.42),
        1: (rng.uniform(0.03, 0.14), 0.62, 0.6),
        3: (rng.uniform(0.9, 0.95), 0.22, 0.86) if shape % 3 == 0 else (hue - 0.03, 0.5, 0.58),
    }[foliage]
    conic, count = shape in (2, 5), {0: 90, 1: 62, 3: 70}[foliage]
    crown = stream(seed, "crown", shape)
    boughs = []
    for _ in range(16):
        turn, reach = crown.uniform(0, 2 * math.pi), math.sqrt(crown.random()) * 0.8
        dx, dy = math.cos(turn) * reach, math.sin(turn) * reach
        boughs.append((dx * (0.2 + 0.4 * (dy + 1)) if conic else dx, dy, crown.uniform(0.16, 0.4)))
    for bough_x, bough_y, spread in sorted(boughs, key=lambda bough: -bough[1]):
        for _ in range(count):
            turn, reach = leaves.uniform(0, 2 * math.pi), math.sqrt(leaves.random()) * spread
            dx, dy = math.cos(turn) * reach, math.sin(turn) * reach
            x, y = columns * (0.5 + 0.4 * (bough_x + dx)), rows * (0.36 + 0.33 * (bough_y + dy))
            light = 0.92 - 0.2 * bough_y - 0.5 * dy / spread * 0.6 - 0.1 * dx / spread + leaves.normal(0, 0.12)
            colour = (*shade(from_hsv(tone[0] + leaves.normal(0, 0.012), tone[1], tone[2]), light), 255)
            cv2.circle(image, (round(x), round(y)), int(leaves.integers(2, 7)), colour, -1, cv2.LINE_AA)
    return image


@lru_cache(maxsize=4)
def people_sprites(seed: int) -> list[Sprite]:
    """Sprites of twenty-four passers-by, 1.75 m high."""
    sprites = []
    for number in range(24):
        rng = stream(seed, "person", number)
        image = np.zeros((192, 80, 4), np.uint8)
        skin = (*shade((224, 180, 150), rng.uniform(0.4, 1.05)), 255)
        coat = (*from_hsv(rng.random(), rng.uniform(0.1, 0.8), rng.uniform(0.15, 0.85)), 255)
        legs = (*from_hsv(rng.uniform(0.5, 0.7), rng.uniform(0, 0.5), rng.uniform(0.12, 0.5)), 255)
        stride = int(rng.integers(2, 16))
        for sign in (-1, 1):
            cv2.line(image, (40 + sign * 5, 104), (40 + sign * stride, 186), legs, 12, cv2.LINE_AA)
            cv2.line(image, (40 + sign * 14, 46), (40 + sign * (16 + stride // 3), 100), coat, 8, cv2.LINE_AA)
        body = np.array([(24, 38), (56, 38), (58, 110), (22, 110)], np.int32)
        cv2.fillConvexPoly(image, body, coat, cv2.LINE_AA)
        cv2.circle(image, (40, 22), 13, skin, -1, cv2.LINE_AA)
        hair = (*from_hsv(0.08, 0.5, rng.uniform(0.08, 0.6)), 255)
        cv2.ellipse(image, (40, 19), (14, 12), 0, 180, 360, hair, -1, cv2.LINE_AA)
        sprites.append(Sprite(image))
    return sprites


@lru_cache(maxsize=2)
def lamp_sprite() -> Sprite:
    """A lamp post, 6 m high."""
    image = np.zeros((480, 96, 4), np.uint8)
    cv2.line(image, (48, 479), (48, 20), (60, 64, 62, 255), 8, cv2.LINE_AA)
    cv2.line(image, (48, 22), (14, 14), (60, 64, 62, 255), 6, cv2.LINE_AA)
    cv2.ellipse(image, (14, 18), (14, 6), 0, 0, 360, (226, 222, 200, 255), -1, cv2.LINE_AA)
    return Sprite(image)


_CORNERS = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.5


@dataclass(frozen=True)
class Car:
    """A car or van: middle of its footprint, direction (radians), length, width, body and roof height, colour."""

    x: float
    y: float
    angle: float
    length: float
    width: float
    body: float
    roof: float
    colour: Colour

    @cached_property
    def mesh(self) -> Floats:
        """Corners float64 [3, 60] (x, y, height): outline on the ground, sill, shoulders, foot and top of the cabin
        (4 each, from back right counter-clockwise), then the rims of the 4 wheels (10 each)."""
        long, wide, back = (0.62, 0.9, 0.12) if self.roof > 2 else (0.46, 0.8, 0.04)  # the cabin's top
        rings = (
            (_CORNERS, 0.0),
            (_CORNERS, 0.3),
            (_CORNERS * (0.98, 0.97), self.body),
            (_CORNERS * (0.94 if self.roof > 2 else 0.66, 0.96) - (back * 0.3, 0), self.body),
            (_CORNERS * (long, wide) - (back, 0), self.roof),
        )
        flat = np.concatenate([ring for ring, _ in rings]) * (self.length, self.width)
        wheels = np.array([(sx * 0.31 * self.length, sy * self.width * 0.5) for sx in (-1, 1) for sy in (-1, 1)])
        turn = np.linspace(0, 2 * np.pi, 10, endpoint=False)
        along = np.append(flat[:, 0], wheels[:, :1] + 0.33 * np.cos(turn))
        across = np.append(flat[:, 1], np.repeat(wheels[:, 1], 10))
        height = np.append(np.repeat([h for _, h in rings], 4), np.tile(0.33 + 0.33 * np.sin(turn), 4))
        c, s = math.cos(self.angle), math.sin(self.angle)
        return np.stack([self.x + along * c - across * s, self.y + along * s + across * c, height])


def traffic(plan: Plan, pano: Panorama) -> tuple[list[Car], list[Figure]]:
    """Cars and people around a camera at its moment: parked at the kerb, driving, walking."""
    rng = stream(plan.settings.seed, "traffic", pano.index)
    cars: list[Car] = []
    people: list[Figure] = []
    looks = people_sprites(plan.settings.seed)
    parked = float(rng.uniform(0.1, 0.75))
    for street in plan.streets:
        run, cross = (pano.x, pano.y) if street.axis == 0 else (pano.y, pano.x)
        if abs(cross - street.centre) > 45:
            continue
        here = run - street.low
        across = [s for s in plan.streets if s.axis != street.axis]
        kerb = street.width / 2 - PAVEMENT - 1.15
        slots = here + np.arange(-48, 48, 6.2) + rng.uniform(0, 6.2)
        for side in (-1, 1):
            for at in slots:
                if rng.random() > parked or any(abs(street.low + at - s.centre) < s.width / 2 + 3 for s in across):
                    continue
                _add_car(cars, rng, street, float(at), side * kerb, pano)
        for _ in range(int(rng.integers(0, 4))):
            _add_car(cars, rng, street, here + float(rng.uniform(-50, 50)), float(rng.choice([-1.7, 1.7])), pano)
        for _ in range(int(rng.integers(0, 9))):
            aside = (street.width / 2 - float(rng.uniform(0.5, PAVEMENT - 0.3))) * (1 if rng.random() < 0.5 else -1)
            x, y = street.point(here + float(rng.uniform(-32, 32)), aside)
            if math.hypot(x - pano.x, y - pano.y) > 2.5:
                people.append(Figure(x, y, float(rng.uniform(1.5, 1.92)), looks[int(rng.integers(0, 24))]))
    return cars, people


def _add_car(
    cars: list[Car], rng: np.random.Generator, street: Street, at: float, aside: float, pano: Panorama
) -> None:
    x, y = street.point(at, aside)
    van = rng.random() < 0.16
    body, roof = (1.0, 2.15) if van else (0.92, float(rng.uniform(1.4, 1.65)))
    hue, grey = rng.random(), rng.random() < 0.6
    colour = from_hsv(hue, 0.05 if grey else rng.uniform(0.5, 0.85), rng.uniform(0.12, 0.9))
    length, width = float(rng.uniform(4.8, 5.4) if van else rng.uniform(3.9, 4.7)), 1.95 if van else 1.78
    clear = 5.5 if van else 4.2
    if math.hypot(x - pano.x, y - pano.y) < clear:
        return
    angle = (0.0 if street.axis == 0 else math.pi / 2) + (math.pi if aside > 0 else 0.0) + float(rng.normal(0, 0.015))
    if all(math.hypot(x - c.x, y - c.y) > 5.6 or abs(aside) > 2 for c in cars):
        cars.append(Car(x, y, angle, length, width, body, roof, colour))
