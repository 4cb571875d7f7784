"""Fronts and side walls of houses: each house has its own material, colours, windows and ornaments."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.city.buildings import Floats
from preprocessing.city.ground_floor import GroundFloor
from preprocessing.city.painting import (
    PAINT,
    Image,
    Wall,
    courses,
    emblem,
    from_hsv,
    lighten,
    shade,
    weather,
    write,
)
from preprocessing.city.plan import stream

MURAL_SHARE = 0.35


class HousePainter:
    """Paints one side of one house. `rng` draws what the whole house shares, `own` what only this side has."""

    def __init__(
        self,
        seed: int,
        building: int,
        block: int,
        epoch: int,
        side: int,
        width: float,
        height: float,
        front: bool,
    ) -> None:
        self.seed, self.front, self.height, self.width = seed, front, height, width
        self.rng = stream(seed, "house", building)
        self.own = stream(seed, "side", building, side)
        self.shop = stream(seed, "shop", building, side, epoch)
        self.block_hue = float(stream(seed, "hue", block).random())

    def paint(self) -> tuple[Image, float, NDArray[np.float32]]:
        rng = self.rng
        self._choose()
        crown, rise = self._silhouette() if self.front else (0.0, np.zeros(2, np.float32))
        self.top = round(crown * PAINT)
        rows, self.columns = round((self.height + crown) * PAINT), max(16, round(self.width * PAINT))
        self.canvas = np.empty((rows, self.columns, 3), np.uint8)
        cv2.rectangle(self.canvas, (0, 0), (self.columns, rows), self.wall, -1)
        self.face = Wall(self.canvas)
        self._material(rng)
        ground = self.height - self.ground_height
        self.floors = max(1, round((ground - 0.8) / 3.2))
        self.storey = (ground - 0.6) / self.floors
        if self.front:
            self._upper_floors()
            self._ornaments()
            GroundFloor(
                self.face, self.width, self.ground_height, self.wall, self.trim, self.accent, self.glass,
                self.seed, self.rng, self.own, self.shop,
            ).paint()  # fmt: skip
        else:
            self._blank_wall()
            self.canvas[:, :2] //= 2
        weather(self.canvas, int(self.own.integers(0, 6)))
        return self.canvas, crown, rise

    def _choose(self) -> None:
        rng = self.rng
        hue = self.block_hue + rng.normal(0, 0.08) if rng.random() < 0.35 else rng.random()
        family = rng.choice(5, p=[0.34, 0.2, 0.2, 0.16, 0.1])
        if family == 0:  # pastel
            self.wall = from_hsv(hue, rng.uniform(0.15, 0.42), rng.uniform(0.7, 0.9))
        elif family == 1:  # brick red to brown
            self.wall = from_hsv(rng.uniform(0.0, 0.07), rng.uniform(0.4, 0.65), rng.uniform(0.38, 0.65))
        elif family == 2:  # cream and stone
            self.wall = from_hsv(rng.uniform(0.08, 0.15), rng.uniform(0.08, 0.3), rng.uniform(0.6, 0.88))
        elif family == 3:  # strong
            self.wall = from_hsv(hue, rng.uniform(0.3, 0.58), rng.uniform(0.35, 0.68))
        else:  # grey to dark
            self.wall = from_hsv(hue, rng.uniform(0.0, 0.12), rng.uniform(0.28, 0.7))
        self.material = int(rng.choice([0, 0, 1, 1, 2, 3, 4, 5])) if family != 1 else 1
        self.trim = [shade(self.wall, 1.35), shade(self.wall, 0.55), (236, 232, 222), (52, 48, 46)][
            int(rng.choice(4, p=[0.25, 0.2, 0.4, 0.15]))
        ]
        self.accent = from_hsv(rng.random(), rng.uniform(0.4, 0.9), rng.uniform(0.3, 0.8))
        self.pitch = float(rng.uniform(1.9, 3.6))  # metres from window to window
        self.window = (float(rng.uniform(0.38, 0.72)) * self.pitch, float(rng.uniform(1.3, 2.2)))
        self.kind = int(rng.integers(0, 7))  # plain, sash, arched, shutters, pediment, ribbon, small panes
        self.surround = int(rng.integers(0, 4))
        self.glass = from_hsv(rng.uniform(0.5, 0.65), rng.uniform(0.1, 0.4), rng.uniform(0.2, 0.45))
        self.ground_height = float(rng.uniform(3.5, 4.3))
        self.balcony = int(rng.integers(0, 8))  # 0 single, 1 full width, 2 alternating, else none
        self.escape, self.pilasters = rng.random() < 0.13, rng.random() < 0.25
        self.cornice, self.courses = float(rng.uniform(0.25, 0.95)), int(rng.integers(0, 4))
        self.quoins = rng.random() < 0.2
        self.crown_kind = int(rng.integers(0, 9))

    def _silhouette(self) -> tuple[float, NDArray[np.float32]]:
        rng = self.rng
        across = np.linspace(-1, 1, 96)
        tall = float(rng.uniform(1.0, 2.8))
        middle = float(rng.uniform(0.25, 0.6))
        shapes: dict[int, Floats] = {
            0: (1 - np.abs(across)) * tall,  # gable
            1: np.floor((1 - np.abs(across)) * 4) / 4 * tall,  # stepped gable
            2: (np.abs(across) < middle) * 0.5 * tall,  # raised middle
            3: (np.sin(across * 19) > 0) * 0.5,  # battlement
            4: np.sqrt(np.clip(1 - (across / middle) ** 2, 0, 1)) * 0.6 * tall,  # round pediment
            5: (across * (1 if tall > 1.9 else -1) > 0.5) * 1.2 * tall,  # turret
        }
        rise = shapes.get(self.crown_kind)
        if rise is None or self.height > 24:
            return 0.0, np.zeros(2, np.float32)
        return float(rise.max()), rise.astype(np.float32)

    def _material(self, rng: np.random.Generator) -> None:
        shape = self.canvas.shape[:2]
        if self.material == 1:
            lighten(self.canvas, courses(shape, rng, 4, 10, 9))
        elif self.material == 2:
            lighten(self.canvas, courses(shape, rng, 18, int(rng.integers(24, 60)), 7))
        elif self.material == 3:  # clapboard
            step = int(rng.integers(5, 9))
            lighten(
                self.canvas,
                np.broadcast_to((np.arange(shape[0]) % step * 4 - 12)[:, None].astype(np.int16), shape),
            )
        elif self.material == 4:  # panels
            lighten(self.canvas, courses(shape, rng, int(rng.integers(40, 90)), int(rng.integers(40, 120)), 10))
        elif self.material == 5:  # ribbed
            step = int(rng.integers(8, 20))
            ribs = (np.abs(np.arange(shape[1]) % step - step // 2) * 3 - 10).astype(np.int16)
            lighten(self.canvas, np.broadcast_to(ribs[None], shape))

    def _upper_floors(self) -> None:
        rng, own = self.rng, self.own
        count = max(1, int((self.width - 0.7) / self.pitch))
        margin = (self.width - count * self.pitch) / 2
        wide, tall = self.window
        if self.kind == 5:
            wide = self.pitch * 0.94
        tall = min(tall, self.storey - 0.75)
        panes = [self._pane(wide, tall, variant) for variant in range(4)]
        skipped = int(own.integers(0, count)) if count > 3 and own.random() < 0.3 else -1
        colours = own.integers(0, 4, (self.floors, count))
        for floor in range(self.floors):
            base = self.ground_height + floor * self.storey
            if self.courses and floor % self.courses == 0:
                self.face.rect(0, base - 0.12, self.width, base + 0.1, self.trim)
            if self.pilasters:
                for column in range(count + 1):
                    x = margin + column * self.pitch
                    self.face.rect(x - 0.14, base, x + 0.14, base + self.storey, self.trim)
            for column in range(count):
                if column == skipped:
                    continue
                x = margin + (column + 0.5) * self.pitch
                self._place(panes[int(colours[floor, column])], x, base + 0.62, wide, tall)
                railed = (
                    (self.balcony == 0 and column == count // 2)
                    or (self.balcony == 2 and (column + floor) % 2 == 0)
                    or self.balcony == 1
                )
                if railed and floor:
                    half = self.pitch / 2 if self.balcony == 1 else wide * 0.72
                    self._railing(x - half, x + half, base + 0.35)
        if self.escape and count > 1:
            self._fire_escape(margin + self.pitch * (0.5 + int(rng.integers(0, count))))

    def _pane(self, wide: float, tall: float, variant: int) -> Image:
        """One window of a few looks: dark glass, reflected sky, curtain, half-drawn blind."""
        rng = stream(self.seed, "pane", variant, int(self.window[0] * 1e4))
        w, h = max(6, round(wide * PAINT)), max(8, round(tall * PAINT))
        pane = np.empty((h, w, 3), np.uint8)
        slope = np.linspace(1.5 if variant == 1 else 1.15, 0.75, h)[:, None, None]
        pane[:] = np.clip(np.array(self.glass) * slope * rng.uniform(0.7, 1.25), 0, 255)
        if variant == 2:
            curtain = from_hsv(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.6, 0.85))
            pane[:, : w // 4] = curtain
            pane[:, -(w // 4) :] = curtain
        elif variant == 3:
            pane[: int(h * rng.uniform(0.3, 0.7))] = from_hsv(rng.random(), 0.12, rng.uniform(0.55, 0.85))
        bars = {1: (1, 1), 6: (3, 4), 5: (3, 0), 2: (2, 2), 3: (2, 3)}.get(self.kind, (2, 1))
        frame = self.trim if self.surround != 3 else shade(self.accent, 0.8)
        for i in range(1, bars[0]):
            pane[:, w * i // bars[0] - 1 : w * i // bars[0] + 1] = frame
        for i in range(1, bars[1] + 1):
            pane[h * i // (bars[1] + 1) - 1 : h * i // (bars[1] + 1) + 1] = frame
        pane[:2], pane[-2:], pane[:, :2], pane[:, -2:] = frame, frame, frame, frame
        pane[2:5] = (pane[2:5] * 0.5).astype(np.uint8)  # the reveal's shadow
        return pane

    def _place(self, pane: Image, x: float, z: float, wide: float, tall: float) -> None:
        trim, half = self.trim, wide / 2
        if self.surround in (0, 1):
            edge = 0.13 if self.surround == 0 else 0.24
            self.face.rect(x - half - edge, z - 0.05, x + half + edge, z + tall + edge, trim)
        self.face.rect(x - half - 0.2, z - 0.16, x + half + 0.2, z, shade(trim, 0.9))
        if self.kind == 3 and wide < self.pitch * 0.6:
            leaf = min(wide * 0.45, (self.pitch - wide) * 0.45)
            for sign in (-1, 1):
                edge = x + sign * (half + leaf / 2)
                self.face.rect(edge - leaf / 2, z, edge + leaf / 2, z + tall, self.accent)
        a, c = round((x - half) * PAINT), self.face.row(z + tall)
        part = self.canvas[max(c, 0) : c + pane.shape[0], max(a, 0) : a + pane.shape[1]]
        part[:] = pane[: part.shape[0], : part.shape[1]]
        top = (round(x * PAINT), c)
        if self.kind == 2:
            cv2.ellipse(self.canvas, top, (round(half * PAINT), round(0.3 * PAINT)), 0, 180, 360, self.glass, -1)
            cv2.ellipse(self.canvas, top, (round(half * PAINT) + 3, round(0.3 * PAINT) + 3), 0, 180, 360, trim, 5)
        elif self.kind == 4:
            reach = round((half + 0.22) * PAINT)
            roof = np.array([(top[0] - reach, c - 4), (top[0] + reach, c - 4), (top[0], c - 17)], np.int32)
            cv2.fillPoly(self.canvas, [roof], trim, cv2.LINE_AA)

    def _railing(self, x0: float, x1: float, z: float) -> None:
        iron = shade(self.accent, 0.45)
        self.face.rect(x0, z - 0.12, x1, z, shade(self.trim, 0.8))
        self.face.rect(x0, z + 0.85, x1, z + 0.92, iron)
        for x in np.arange(x0, x1, 0.16):
            self.face.rect(x, z, x + 0.05, z + 0.9, iron)

    def _fire_escape(self, x: float) -> None:
        iron, half = (38, 36, 40), 1.25
        for floor in range(1, self.floors):
            z = self.ground_height + floor * self.storey
            self.face.rect(x - half, z - 0.1, x + half, z, iron)
            self.face.rect(x - half, z + 0.85, x + half, z + 0.92, iron)
            for bar in np.arange(x - half, x + half, 0.3):
                self.face.rect(bar, z, bar + 0.05, z + 0.9, iron)
            sign = 1 if floor % 2 else -1
            ends = [(x - sign * half * 0.8, z), (x + sign * half * 0.8, z - self.storey)]
            a, b = ((round(px * PAINT), self.face.row(pz)) for px, pz in ends)
            cv2.line(self.canvas, a, b, iron, 4, cv2.LINE_AA)

    def _ornaments(self) -> None:
        roof = self.height
        if self.top:
            self.canvas[: self.top] = (self.canvas[: self.top] * 0.92).astype(np.uint8)
            x, z = self.width / 2, roof + self.top / PAINT * 0.35
            emblem(self.canvas, self.rng, x * PAINT, self.face.row(z), 9, self.trim)
        self.face.rect(0, roof - self.cornice, self.width, roof - 0.05, self.trim)
        self.face.rect(0, roof - self.cornice - 0.12, self.width, roof - self.cornice, shade(self.trim, 0.55))
        if self.cornice > 0.5:
            for x in np.arange(0.1, self.width, self.pitch / 5):
                self.face.rect(
                    x,
                    roof - self.cornice,
                    x + self.pitch / 10,
                    roof - self.cornice * 0.5,
                    shade(self.trim, 0.7),
                )
        if self.quoins:
            for i, z in enumerate(np.arange(self.ground_height, roof - self.cornice, 0.5)):
                long = 0.55 if i % 2 else 0.35
                self.face.rect(0, z, long, z + 0.44, self.trim)
                self.face.rect(self.width - long, z, self.width, z + 0.44, self.trim)
        self.face.rect(0, self.ground_height - 0.05, self.width, self.ground_height + 0.25, shade(self.trim, 0.9))

    def _blank_wall(self) -> None:
        own = self.own
        self.canvas[:] = (self.canvas * 0.9).astype(np.uint8)
        rows, columns = self.canvas.shape[:2]
        if own.random() < MURAL_SHARE and self.height > 7:
            a, b = int(columns * own.uniform(0.05, 0.2)), int(columns * own.uniform(0.75, 0.95))
            c, d = int(rows * own.uniform(0.04, 0.15)), int(rows * own.uniform(0.45, 0.7))
            wall = np.ascontiguousarray(self.canvas[c:d, a:b])
            wall[:] = from_hsv(own.random(), own.uniform(0.3, 0.9), own.uniform(0.4, 0.95))
            for _ in range(int(own.integers(3, 9))):
                ink = from_hsv(own.random(), own.uniform(0.4, 1), own.uniform(0.3, 1))
                size = own.uniform(0.1, 0.4) * min(wall.shape[:2])
                emblem(wall, own, own.uniform(0, wall.shape[1]), own.uniform(0, wall.shape[0]), size, ink)
            band = int(wall.shape[0] * own.uniform(0.5, 0.75))
            write(
                wall,
                self.seed,
                own,
                (4, band, wall.shape[1] - 4, min(wall.shape[0], band + 70)),
                (250, 248, 240),
            )
            self.canvas[c:d, a:b] = wall
            return
        for floor in range(self.floors):
            for x in np.arange(2.0, self.width - 1.5, 3.4):
                if own.random() < 0.45:
                    z = self.ground_height + floor * self.storey + 0.9
                    self.face.rect(x - 0.08, z - 0.08, x + 0.88, z + 1.18, shade(self.trim, 0.8))
                    self.face.rect(x, z, x + 0.8, z + 1.1, shade(self.glass, own.uniform(0.6, 1.2)))
        pipe = float(own.uniform(0.3, max(0.4, self.width - 0.5)))
        self.face.rect(pipe, 0, pipe + 0.12, self.height, shade(self.wall, 0.5))
