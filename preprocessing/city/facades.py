"""Textures of facades at several resolutions, painted on first use and kept while they are needed."""

from __future__ import annotations

from collections import OrderedDict

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.city.houses import HousePainter
from preprocessing.city.painting import PAINT, Image, paint_fence
from preprocessing.city.plan import Plan, stream

_BYTES_KEPT = 500_000_000


class Facade:
    """One side of one building: `rise` float32 [columns], metres that the top edge stands over the roof along the
    facade, and the texture in levels reduced by 2**v vertically and 2**h horizontally."""

    def __init__(self, base: Image, density: float, crown: float, rise: NDArray[np.float32]) -> None:
        self.base = base
        self.density = density
        self.crown = crown
        self.rise = rise
        self._levels: dict[tuple[int, int], Image] = {(0, 0): base}

    def level(self, v: int, h: int) -> Image:
        """The texture uint8 [rows >> v, columns >> h, 3], RGB, averaged over the texels that it stands for."""
        found = self._levels.get((v, h))
        if found is None:
            source = self.level(v - 1, h) if v > 0 else self.level(v, h - 1)
            rows, columns = source.shape[:2]
            shape = (columns, max(1, rows // 2)) if v > 0 else (max(1, columns // 2), rows)
            found = self._levels[v, h] = cv2.resize(source, shape, interpolation=cv2.INTER_AREA)
        return found


class Facades:
    """Paints facades on first use and keeps the most recently used ones, up to so many bytes."""

    def __init__(self, plan: Plan, density: float) -> None:
        self.plan = plan
        self.density = density
        chance = stream(plan.settings.seed, "shops").random((len(plan.buildings.box), len(plan.calendar)))
        self.epochs = np.cumsum((chance < 0.07) & (np.arange(len(plan.calendar)) > 0), axis=1)
        self._held: OrderedDict[tuple[int, int, int], Facade] = OrderedDict()
        self._bytes = 0

    def get(self, building: int, side: int, year: int) -> Facade:
        """The facade of a building's side (0 west, 1 east, 2 south, 3 north) in a year."""
        epoch = int(self.epochs[building, year])
        key = (building, side, epoch)
        found = self._held.get(key)
        if found is None:
            found = self._held[key] = self._paint(building, side, epoch)
            self._bytes += int(found.base.nbytes * 2.5)
            while self._bytes > _BYTES_KEPT:
                _, old = self._held.popitem(last=False)
                self._bytes -= int(old.base.nbytes * 2.5)
        else:
            self._held.move_to_end(key)
        return found

    def _paint(self, building: int, side: int, epoch: int) -> Facade:
        plan = self.plan
        box = plan.buildings.box[building]
        width = float(box[3] - box[1] if side < 2 else box[2] - box[0])
        seed = plan.settings.seed
        if plan.buildings.kind[building] == 1:
            canvas = paint_fence(stream(seed, "fence", building), width, float(box[4]))
            crown, rise = 0.0, np.zeros(2, np.float32)
        else:
            block = int(plan.buildings.block[building])
            front = bool(plan.buildings.front[building, side])
            painter = HousePainter(seed, building, block, epoch, side, width, float(box[4]), front)
            canvas, crown, rise = painter.paint()
        scale = min(1.0, self.density / PAINT)
        if not plan.buildings.front[building, side]:
            scale *= 0.5  # seen from afar, over the roofs and through gaps
        if scale < 1.0:
            shape = (max(2, round(canvas.shape[1] * scale)), max(2, round(canvas.shape[0] * scale)))
            canvas = cv2.resize(canvas, shape, interpolation=cv2.INTER_AREA)
        return Facade(canvas, PAINT * scale, crown, rise)
