"""Draws what stands between camera and facades: trees, lamp posts, people and cars."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.city.painting import Colour, Image, shade
from preprocessing.city.scenery import Car, Figure
from preprocessing.city.view import Lens, Row, Surroundings


def draw_things(image: Image, around: Surroundings, lens: Lens, depth: Row) -> None:
    """Draws trees, lamps, people and cars, farthest first, hidden where a facade is nearer."""
    fx, fy = lens.forward
    weather = around.weather
    light = weather.ambient + 0.5 * weather.sun
    things: list[tuple[float, float, Figure | Car]] = []
    standing: list[Figure | Car] = [*around.figures, *around.cars]
    for thing in standing:
        dx, dy = thing.x - lens.x, thing.y - lens.y
        ahead, aside = dx * fx + dy * fy, dx * fy - dy * fx
        if ahead > 1.2 and abs(aside) < ahead * 0.75 + 4.5:
            things.append((ahead, aside, thing))
    things.sort(key=lambda t: -t[0])
    for ahead, aside, thing in things:
        if isinstance(thing, Car):
            _draw_car(image, thing, lens, depth, light)
        else:
            _draw_figure(image, thing, ahead, aside, lens, depth, light)


def _draw_figure(
    image: Image, figure: Figure, ahead: float, aside: float, lens: Lens, depth: Row, light: float
) -> None:
    sprite = figure.sprite
    scale = lens.focal / ahead
    tall = figure.height * scale
    wide = tall * sprite.aspect
    foot_x, foot_y = lens.width / 2 + aside * scale, lens.horizon + lens.z * scale
    if tall < 3:
        return
    x0, x1 = max(0, math.floor(foot_x - wide / 2)), min(lens.width, math.ceil(foot_x + wide / 2))
    y0, y1 = max(0, math.floor(foot_y - tall)), min(lens.height, math.ceil(foot_y))
    if x1 <= x0 or y1 <= y0:
        return
    open_columns = depth[x0:x1] > ahead
    if not open_columns.any():
        return
    level = min(len(sprite.levels) - 1, max(0, round(math.log2(max(1e-6, sprite.levels[0].shape[0] / tall)))))
    source = sprite.levels[level]
    zoom = source.shape[0] / tall
    matrix = np.array(
        [
            [zoom, 0, (x0 + 0.5 - foot_x + wide / 2) * zoom - 0.5],
            [0, zoom, (y0 + 0.5 - foot_y + tall) * zoom - 0.5],
        ]
    )
    rgba = cv2.warpAffine(source, matrix, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    if not open_columns.all():
        rgba[:, ~open_columns] = 0
    colour, alpha = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), cv2.extractChannel(rgba, 3)
    part = image[y0:y1, x0:x1]
    rest = cv2.multiply(part, cv2.cvtColor(cv2.bitwise_not(alpha), cv2.COLOR_GRAY2RGB), scale=1 / 255)
    cv2.add(rest, cv2.convertScaleAbs(colour, alpha=light), dst=part)


def _draw_car(image: Image, car: Car, lens: Lens, depth: Row, light: float) -> None:
    c, s = math.cos(car.angle), math.sin(car.angle)
    x, y, z = car.mesh
    x, y = x - lens.x, y - lens.y
    fx, fy = lens.forward
    ahead = x * fx + y * fy
    if ahead.min() < 1.0:
        return
    scale = lens.focal / ahead
    px = lens.width / 2 + (x * fy - y * fx) * scale
    py = lens.horizon + (lens.z - z) * scale
    a, b = max(0, math.floor(px.min()) - 1), min(lens.width, math.ceil(px.max()) + 1)
    if b <= a:
        return
    hidden = depth[a:b] < ahead.mean()
    if hidden.all():
        return
    saved = image[:, a:b][:, hidden].copy() if hidden.any() else None
    points = np.round(np.stack([px, py], 1) * 8).astype(np.int32)

    def fill(corners: list[int] | NDArray[np.intp], colour: Colour) -> None:
        cv2.fillConvexPoly(image, points[corners], colour, cv2.LINE_AA, 3)

    paint, glass = shade(car.colour, light), shade((52, 60, 68), light)
    fill([0, 1, 2, 3], (22, 22, 24))
    to_x, to_y = lens.x - car.x, lens.y - car.y
    view_x, view_y = to_x * c + to_y * s, to_y * c - to_x * s  # the camera, seen from the car
    sides = [(0, 1, view_y < -car.width / 2), (1, 2, view_x > car.length / 2)]
    sides += [(2, 3, view_y > car.width / 2), (3, 0, view_x < -car.length / 2)]
    tones = (0.9, 0.75, 0.9, 0.75)
    if lens.z > car.body:
        fill([8, 9, 10, 11], shade(paint, 1.12))
    for (i, j, seen), tone in zip(sides, tones, strict=True):
        if seen:
            fill([4 + i, 4 + j, 8 + j, 8 + i], shade(paint, tone))
            fill([i, j, 4 + j, 4 + i], shade(paint, 0.35))
    for number in range(4):  # odd ones are on the left
        if view_y > car.width / 2 if number % 2 else view_y < -car.width / 2:
            fill(np.arange(20 + number * 10, 30 + number * 10), (24, 24, 26))
    pillar = max(1, round(0.07 * float(scale[0])))
    for i, j, seen in sides:
        if seen:
            fill([12 + i, 12 + j, 16 + j, 16 + i], glass)
            for k in (i, j):
                foot, top = points[(12 + k, 16 + k), :].tolist()
                cv2.line(image, foot, top, shade(paint, 0.8), pillar, cv2.LINE_AA, 3)
    if lens.z > car.roof:
        fill([16, 17, 18, 19], shade(paint, 1.15))
    if car.roof > 2:
        for i, j, seen in sides[::2]:
            if seen:
                fill([12 + i, 12 + j, 16 + j, 16 + i], shade(paint, 0.92))
    if saved is not None:
        image[:, a:b][:, hidden] = saved
