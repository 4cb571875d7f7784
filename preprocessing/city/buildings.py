"""The buildings of a procedural city: lots along the sides of its blocks, as boxes that rays can be cast at.

Lengths are metres in the city's own frame (`plan.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


Block = tuple[float, float, float, float]
"""x0, y0, x1, y1."""


@dataclass(frozen=True)
class Buildings:
    """Axis-aligned boxes. `box` float64 [n, 5]: x0, y0, x1, y1, height; `front` bool [n, 4]: whether the west, east,
    south, north side looks onto a street; `kind` int8 [n]: 0 house, 1 wall or fence; `block` int32 [n]."""

    box: Floats
    front: NDArray[np.bool_]
    kind: NDArray[np.int8]
    block: NDArray[np.int32]


def place_buildings(
    columns: list[tuple[float, float]], rows: list[tuple[float, float]], rng: np.random.Generator
) -> tuple[Buildings, list[Block]]:
    """Buildings around every block, and the blocks that are parks instead, a tenth of the inner ones.

    `columns` and `rows` are the low and high edges of the blocks along x and along y.
    """
    lots: list[tuple[tuple[float, ...], list[bool], bool, int]] = []
    parks: list[Block] = []
    for i, (x0, x1) in enumerate(columns):
        for j, (y0, y1) in enumerate(rows):
            block = (x0, y0, x1, y1)
            inner = 0 < i < len(columns) - 1 and 0 < j < len(rows) - 1
            if inner and rng.random() < 0.1 and len(parks) * 8 < (len(columns) - 2) * (len(rows) - 2):
                parks.append(block)
            else:
                lots += [(*lot, i * len(rows) + j) for lot in _lots(block, rng)]
    box, front, fence, number = zip(*lots, strict=True)
    return Buildings(np.array(box), np.array(front), np.array(fence, np.int8), np.array(number, np.int32)), parks


def _lots(block: Block, rng: np.random.Generator) -> Iterator[tuple[tuple[float, ...], list[bool], bool]]:
    """Box, sides that look onto a street, and whether it is a fence in a gap, of every lot of a block."""
    x0, y0, x1, y1 = block
    floors = float(rng.choice([2.2, 3.0, 3.6, 4.4, 6.0]))
    gaps, depth = float(rng.uniform(0.0, 0.13)), float(rng.uniform(11, 15))
    setback_share = float(rng.choice([0.0, 0.25, 0.7]))
    for side in range(4):  # west, east, south, north
        low, high = (x0, x1) if side >= 2 else (y0 + depth, y1 - depth)
        cuts = _cut(rng, low, high)
        ends = (0, len(cuts) - 2)
        for lot, (a, b) in enumerate(pairwise(cuts)):
            corner = side >= 2 and lot in ends
            gap = not corner and rng.random() < gaps
            back = rng.uniform(0.6, 3.2) if not corner and rng.random() < setback_share else 0.0
            height = 3.9 + 3.2 * max(1, round(rng.normal(floors - 1, 1.0))) + rng.uniform(0.4, 1.4)
            if rng.random() < 0.05:
                height += 3.2 * rng.integers(3, 7)
            near, far = back, depth
            if gap:
                height, near, far = rng.uniform(1.2, 2.6), 0.2, 0.5
            front = [k == side or (side >= 2 and k < 2 and lot == ends[k]) for k in range(4)]
            yield _lot_box(side, a, b, near, far, block, height), front, gap


def cast(boxes: Floats, x: float, y: float, rays_x: Floats, rays_y: Floats) -> Floats:
    """Ray parameter [rays, boxes] at which rays from (x, y) enter axis-aligned boxes [n, 5]; inf where they miss."""
    inverse_x = 1.0 / np.where(np.abs(rays_x) < 1e-9, 1e-9, rays_x)[:, None]
    inverse_y = 1.0 / np.where(np.abs(rays_y) < 1e-9, 1e-9, rays_y)[:, None]
    ax, bx = (boxes[:, 0] - x) * inverse_x, (boxes[:, 2] - x) * inverse_x
    ay, by = (boxes[:, 1] - y) * inverse_y, (boxes[:, 3] - y) * inverse_y
    enter = np.maximum(np.minimum(ax, bx), np.minimum(ay, by))
    leave = np.minimum(np.maximum(ax, bx), np.maximum(ay, by))
    return np.where((enter <= leave) & (enter > 0), enter, np.inf)


def _cut(rng: np.random.Generator, low: float, high: float) -> list[float]:
    """Borders of the lots of one side of a block."""
    cuts = [low]
    while high - cuts[-1] > 21:
        cuts.append(cuts[-1] + float(rng.uniform(6.5, 14.5)))
    if high - cuts[-1] > 15:
        cuts.append((cuts[-1] + high) / 2)
    return [*cuts, high]


def _lot_box(side: int, a: float, b: float, near: float, far: float, block: Block, height: float) -> tuple[float, ...]:
    x0, y0, x1, y1 = block
    if side == 0:
        return (x0 + near, a, x0 + far, b, height)
    if side == 1:
        return (x1 - far, a, x1 - near, b, height)
    if side == 2:
        return (a, y0 + near, b, y0 + far, height)
    return (a, y1 - far, b, y1 - near, height)
