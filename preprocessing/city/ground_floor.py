"""Ground floors of houses: shops with signs and awnings, entrances, garages, arcades."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from preprocessing.city.painting import PAINT, Colour, Wall, emblem, from_hsv, shade, write


@dataclass
class GroundFloor:
    """The ground floor of a front: `width` and `height` in metres, and the house's colours.

    `rng` draws what the whole house shares, `own` what only this side has, `shop` what changes over the years.
    """

    face: Wall
    width: float
    height: float
    plaster: Colour
    trim: Colour
    accent: Colour
    glass: Colour
    seed: int
    rng: np.random.Generator
    own: np.random.Generator
    shop: np.random.Generator

    def paint(self) -> None:
        """Draw a unit beside the other along the whole width."""
        rng = self.rng
        units = max(1, round(self.width / float(rng.uniform(4.0, 7.5))))
        each = self.width / units
        self.face.rect(0, 0, self.width, 0.5, shade(self.plaster, 0.6))
        for unit in range(units):
            x0, x1 = unit * each + 0.2, (unit + 1) * each - 0.2
            use = int(rng.choice(4, p=[0.58, 0.2, 0.1, 0.12]))
            if use == 0:
                self._shop(x0, x1)
            elif use == 1:
                self._entrance(x0, x1)
            elif use == 2:
                self._garage(x0, x1)
            else:
                self._arcade(x0, x1)

    def _shop(self, x0: float, x1: float) -> None:
        rng = self.shop
        top = self.height - 0.15
        back = from_hsv(rng.random(), rng.uniform(0.3, 0.95), rng.uniform(0.25, 0.95))
        ink = (246, 244, 236) if sum(back) < 390 else from_hsv(rng.random(), 0.8, 0.25)
        frame = from_hsv(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.15, 0.6))
        self.face.rect(x0, 0, x1, top - 0.85, frame)
        door = x0 + (x1 - x0 - 1.1) * int(rng.integers(0, 3)) / 2
        glow = from_hsv(rng.uniform(0.06, 0.16), rng.uniform(0.1, 0.5), rng.uniform(0.25, 0.7))
        panes = max(1, int((x1 - x0) / float(rng.uniform(1.2, 2.6))))
        for i in range(panes):
            a, b = x0 + (x1 - x0) * i / panes, x0 + (x1 - x0) * (i + 1) / panes
            self.face.rect(a + 0.06, 0.55, b - 0.06, top - 0.95, shade(glow, rng.uniform(0.6, 1.2)))
            for _ in range(int(rng.integers(1, 5))):  # goods and bills in the window
                w, h = rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.8)
                px, pz = rng.uniform(a + 0.1, max(a + 0.11, b - w - 0.1)), rng.uniform(0.6, 1.6)
                self.face.rect(
                    px,
                    pz,
                    min(px + w, b - 0.08),
                    pz + h,
                    from_hsv(rng.random(), rng.uniform(0.3, 0.9), rng.uniform(0.3, 1)),
                )
        self.face.rect(door, 0.05, door + 1.05, 2.35, shade(frame, 0.6))
        self.face.rect(door + 0.15, 0.7, door + 0.9, 2.2, shade(glow, 0.7))
        self.face.rect(x0, top - 0.85, x1, top, back)
        a, b = round(x0 * PAINT), round(x1 * PAINT)
        c, d = self.face.row(top), self.face.row(top - 0.85)
        mark = d - c
        emblem(self.face.canvas, rng, a + mark * 0.7, (c + d) / 2, mark * 0.36, ink)
        write(self.face.canvas, self.seed, rng, (a + mark + 4, c, b - 4, d), ink)
        if rng.random() < 0.45:  # awning
            self._awning(x0, x1, top - 0.85, back, rng)

    def _awning(self, x0: float, x1: float, z: float, back: Colour, rng: np.random.Generator) -> None:
        other = (240, 238, 230) if rng.random() < 0.6 else shade(back, 0.6)
        for i, x in enumerate(np.arange(x0, x1, 0.35)):
            self.face.rect(x, z - 0.75, min(x + 0.35, x1), z, back if i % 2 else other)
        self.face.rect(x0, z - 0.82, x1, z - 0.72, shade(back, 0.5))

    def _entrance(self, x0: float, x1: float) -> None:
        own = self.own
        x = (x0 + x1) / 2
        half = float(own.uniform(0.5, 1.0))
        self.face.rect(x - half - 0.3, 0, x + half + 0.3, 3.1, self.trim)
        self.face.rect(x - half, 0.3, x + half, 2.6, self.accent)
        self.face.rect(x - 0.03, 0.3, x + 0.03, 2.6, shade(self.accent, 0.5))
        self.face.rect(x - half, 2.62, x + half, 2.95, self.glass)
        for step in range(3):
            self.face.rect(
                x - half - 0.4,
                step * 0.13,
                x + half + 0.4,
                step * 0.13 + 0.1,
                shade((170, 166, 160), 1 - 0.12 * step),
            )
        for px in (x0 + 0.1, x1 - 1.1):
            if px + 1.0 < x - half - 0.35 or px > x + half + 0.35:
                self.face.rect(px, 1.0, px + 1.0, 2.6, self.trim)
                self.face.rect(px + 0.1, 1.1, px + 0.9, 2.5, self.glass)

    def _garage(self, x0: float, x1: float) -> None:
        colour = from_hsv(self.own.random(), self.own.uniform(0, 0.6), self.own.uniform(0.35, 0.85))
        self.face.rect(x0, 0, x1, 2.9, self.trim)
        self.face.rect(x0 + 0.2, 0.05, x1 - 0.2, 2.7, colour)
        for z in np.arange(0.3, 2.7, 0.42):
            self.face.rect(x0 + 0.2, z, x1 - 0.2, z + 0.06, shade(colour, 0.65))

    def _arcade(self, x0: float, x1: float) -> None:
        count = max(1, int((x1 - x0) / 2.0))
        each = (x1 - x0) / count
        for i in range(count):
            x, half = x0 + (i + 0.5) * each, each * 0.36
            self.face.rect(x - half, 0, x + half, 2.3, shade(self.glass, 0.6))
            centre = (round(x * PAINT), self.face.row(2.3))
            cv2.ellipse(
                self.face.canvas,
                centre,
                (round(half * PAINT), round(0.8 * PAINT)),
                0,
                180,
                360,
                shade(self.glass, 0.6),
                -1,
            )
            cv2.ellipse(self.face.canvas, centre, (round(half * PAINT), round(0.8 * PAINT)), 0, 180, 360, self.trim, 4)
