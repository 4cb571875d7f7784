"""Renders street-level photos of a procedural city: a pinhole camera with a level horizon, one ray per image column.

Facades are vertical, so every image column sees one facade along a straight line of its texture: a column needs one
ray against the buildings, and its pixels are an affine walk down that line. Columns of one facade and one texture
level are resampled together. A hand-held camera's pitch and roll are a homography of a larger level view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.city.buildings import cast
from preprocessing.city.facades import Facade, Facades
from preprocessing.city.figures import draw_things
from preprocessing.city.ground import Ground
from preprocessing.city.painting import Image
from preprocessing.city.plan import FIELD_OF_VIEW, Panorama, Plan, Weather, stream
from preprocessing.city.scenery import (
    SKY_COLOURS,
    Figure,
    lamp_sprite,
    paint_sky,
    traffic,
    tree_sprites,
)
from preprocessing.city.view import Lens, Row, Surroundings

VIEW_RANGE = 200.0
"""How far buildings are drawn, metres."""
NORMALS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))


@dataclass
class Layer:
    """The facade behind every column of a view; arrays [columns], float32 unless said."""

    hit: NDArray[np.bool_]
    depth: Row  # metres along the optical axis
    x: Row
    y: Row
    side: NDArray[np.intp]
    scale: Row  # pixels a metre
    top: Row  # image rows of the upper and lower edge
    bottom: Row
    across: Row  # texture column
    down: Row  # texture rows a pixel row
    start: Row  # texture row of image row 0
    spans: list[tuple[int, int, Facade]]  # first column, last column + 1, facade


class Renderer:
    """Renders the photos of a plan. Holds textures, so keep one for each process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.size = plan.settings.size
        self.focal = self.size / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
        self.facades = Facades(plan, 32.0 * max(self.size, 64) / 512)
        self.ground = Ground(plan, self.size)
        self.box = plan.buildings.box.astype(np.float32)
        self._skies: dict[int, Image] = {}
        self._scratch: dict[int, tuple[Image, NDArray[np.float32], NDArray[np.float32]]] = {}
        rng = stream(plan.settings.seed, "noise")
        shape = (2 * self.size, 2 * self.size, 3)
        self.noise = [np.clip(rng.normal(0, s, shape), 0, 255).astype(np.uint8) for s in (2.5, 2.5)]

    def look_around(self, pano: Panorama) -> Surroundings:
        """Prepares what the views of one panorama share."""
        plan = self.plan
        weather = plan.weather(pano.year, pano.drive)
        middle_x, middle_y = (self.box[:, 0] + self.box[:, 2]) / 2, (self.box[:, 1] + self.box[:, 3]) / 2
        away = np.hypot(middle_x - pano.x, middle_y - pano.y)
        near = np.flatnonzero(away < VIEW_RANGE)
        turn = np.linspace(-np.pi, np.pi, 400, endpoint=False, dtype=np.float32)
        enter = cast(self.box[near], pano.x, pano.y, np.cos(turn), np.sin(turn))
        slope = (self.box[near, 4] + 2.0 - pano.height) / enter
        seen = np.union1d(np.argmin(enter, 1)[np.isfinite(enter.min(1))], np.argmax(slope, 1))
        cars, people = traffic(plan, pano)
        trees = plan.trees
        trees = trees[np.hypot(trees[:, 0] - pano.x, trees[:, 1] - pano.y) < 90] if len(trees) else trees
        kinds = tree_sprites(plan.settings.seed)
        figures = [Figure(x, y, h, kinds[int(shape)][weather.foliage]) for x, y, h, shape in trees.tolist()]
        lamps = plan.lamps[np.hypot(plan.lamps[:, 0] - pano.x, plan.lamps[:, 1] - pano.y) < 70]
        figures += [Figure(x, y, 6.0, lamp_sprite()) for x, y in lamps.tolist()]
        figures += people
        ground = self.ground.patches(pano.x, pano.y, weather, trees)
        return Surroundings(pano, weather, near[seen], self.box[away < 75], ground, cars, figures)

    def photo(self, around: Surroundings, number: int) -> Image:
        """One photo uint8 [size, size, 3], RGB, of the panorama's heading of that number."""
        pano, size, focal = around.pano, self.size, self.focal
        rng = stream(self.plan.settings.seed, "photo", pano.index, number)
        angle = self.plan.angle_of(pano.headings[number])
        if pano.split == "train":
            tilt = focal * math.tan(math.radians(float(rng.normal(0, 0.8))))
            angle += math.radians(float(rng.normal(0, 0.8)))
            lens = Lens(size, size, focal, size / 2 + tilt, pano.x, pano.y, pano.height, angle)
            image = self._level_view(around, lens)
        else:
            wide = size + 2 * round(size * 0.14)
            lens = Lens(wide, wide, focal, wide / 2, pano.x, pano.y, pano.height, angle)
            image = _tilted(self._level_view(around, lens), size, focal, rng)
        return self._expose(image, around.weather, rng)

    def _level_view(self, around: Surroundings, lens: Lens) -> Image:
        image = np.empty((lens.height, lens.width, 3), np.uint8)
        self._draw_sky(image, around.weather, lens)
        _draw_ground(image, around, lens)
        depth = self._draw_buildings(image, around, lens)
        draw_things(image, around, lens, depth)
        return image

    def _draw_sky(self, image: Image, weather: Weather, lens: Lens) -> None:
        sky = self._skies.get(weather.sky)
        if sky is None:
            rows = round(self.size * 0.8)
            sky = self._skies[weather.sky] = paint_sky(self.plan.settings.seed, weather.sky, self.focal, rows)
        columns = sky.shape[1] // 2
        first = round(-lens.angle * lens.focal - lens.width / 2) % columns
        rows = min(lens.height, math.ceil(lens.horizon) + 1)
        image[:rows] = sky[sky.shape[0] - rows :, first : first + lens.width]

    def _draw_buildings(self, image: Image, around: Surroundings, lens: Lens) -> Row:
        """Draws facades; returns the depth float32 [columns] of the nearest one (inf where there is none)."""
        fx, fy = lens.forward
        box = self.box[around.visible]
        ahead = (box[:, (0, 2, 0, 2)] - lens.x) * fx + (box[:, (1, 1, 3, 3)] - lens.y) * fy
        keep = ahead.max(1) > 0.2
        chosen, box = around.visible[keep], box[keep]
        if not len(box):
            return np.full(lens.width, np.inf, np.float32)
        slope = ((np.arange(lens.width, dtype=np.float32) + 0.5) - lens.width / 2) / lens.focal
        rays = np.stack([fx + fy * slope, fy - fx * slope]).astype(np.float32)
        columns = np.arange(lens.width)
        enter = cast(box, lens.x, lens.y, rays[0], rays[1])
        first = np.argmin(enter, 1)
        near = enter[columns, first].astype(np.float32)
        rise = (box[:, 4] - lens.z) / enter
        rise[columns, first] += 1e-4
        tallest = np.argmax(rise, 1)
        far = np.where(tallest != first, enter[columns, tallest], np.inf).astype(np.float32)
        front = self._meet(around, lens, chosen[first], near, rays)
        far[lens.horizon - (box[tallest, 4] + 3 - lens.z) * lens.focal / far >= front.top] = np.inf  # hidden
        if np.isfinite(far).any():
            back = self._meet(around, lens, chosen[tallest], far, rays)
            back.bottom = np.minimum(back.bottom, np.ceil(front.top) + 1)
            self._draw_layer(image, around, lens, back)
        self._draw_layer(image, around, lens, front)
        return near

    def _meet(
        self,
        around: Surroundings,
        lens: Lens,
        building: NDArray[np.intp],
        depth: Row,
        rays: NDArray[np.float32],
    ) -> Layer:
        """Which facade each column meets at `depth` (inf: none), and where in its texture."""
        hit = np.isfinite(depth)
        depth = np.where(hit, depth, np.float32(1e6))
        box = self.box[building]
        x, y = lens.x + depth * rays[0], lens.y + depth * rays[1]
        gap = np.abs(np.stack([x - box[:, 0], x - box[:, 2], y - box[:, 1], y - box[:, 3]]))
        gap[0][rays[0] <= 0] = gap[1][rays[0] >= 0] = gap[2][rays[1] <= 0] = gap[3][rays[1] >= 0] = np.inf
        side = np.argmin(gap, 0)
        along = np.choose(side, (box[:, 3] - y, y - box[:, 1], x - box[:, 0], box[:, 2] - x))
        face = np.where(hit, building * 4 + side, -1)
        scale = np.float32(lens.focal) / depth
        edges = [0, *(np.flatnonzero(np.diff(face)) + 1).tolist(), len(face)]
        top_z, origin, density = box[:, 4].copy(), box[:, 4].copy(), np.ones_like(depth)
        spans: list[tuple[int, int, Facade]] = []
        for a, b in pairwise(edges):
            if face[a] < 0:
                continue
            facade = self.facades.get(int(building[a]), int(side[a]), around.pano.year)
            spans.append((a, b, facade))
            density[a:b] = facade.density
            if facade.crown > 0:
                origin[a:b] += facade.crown
                place = np.clip(along[a:b] * facade.density / facade.base.shape[1], 0, 0.999) * len(facade.rise)
                top_z[a:b] += facade.rise[place.astype(np.intp)]
        return Layer(
            hit=hit,
            depth=depth,
            x=x,
            y=y,
            side=side,
            scale=scale,
            top=lens.horizon - (top_z - lens.z) * scale,
            bottom=np.where(hit, lens.horizon + lens.z * scale, -1),
            across=along * density,
            down=density / scale,
            start=((origin - lens.z) - lens.horizon / scale) * density,
            spans=spans,
        )

    def _draw_layer(self, image: Image, around: Surroundings, lens: Lens, layer: Layer) -> None:
        """Draws one layer of facades over what is there."""
        low = np.clip(np.floor(layer.top), 0, lens.height).astype(np.int32)
        high = np.clip(np.ceil(layer.bottom), 0, lens.height).astype(np.int32)
        slide = np.abs(np.diff(layer.across))
        rate = np.minimum(np.append(slide, slide[-1:]), np.append(slide[:1], slide))
        level_x = np.clip(np.round(np.log2(np.maximum(rate, 1e-3)) - 0.15), 0, 6).astype(np.int32)
        level_y = np.clip(np.round(np.log2(layer.down) - 0.15), 0, 6).astype(np.int32)
        first, last = int(low[layer.hit].min()), int(high[layer.hit].max())
        if last <= first:
            return
        wall, map_x, map_y = self._buffers(lens)
        shrink = np.float32(0.5) ** level_y
        rows = np.arange(first, last, dtype=np.float32)[:, None] + np.float32(0.5)
        np.multiply(rows, (layer.down * shrink)[None], out=map_y[first:last])
        map_y[first:last] += (layer.start * shrink - np.float32(0.5))[None]
        map_x[first:last] = (layer.across * np.float32(0.5) ** level_x - np.float32(0.5))[None]
        gains, hazy = _gains(around.weather), float(np.mean(SKY_COLOURS[around.weather.sky][1]))
        key = level_y * 8 + level_x
        for start, stop, facade in layer.spans:
            cuts = (np.flatnonzero(np.diff(key[start:stop])) + start + 1).tolist()
            gain = gains[layer.side[start]]
            for a, b in zip([start, *cuts], [*cuts, stop], strict=True):
                r0, r1 = int(low[a:b].min()), int(high[a:b].max())
                if r1 <= r0:
                    continue
                part = wall[r0:r1, a:b]
                texture = facade.level(int(level_y[a]), int(level_x[a]))
                places = map_x[r0:r1, a:b], map_y[r0:r1, a:b]
                cv2.remap(texture, *places, cv2.INTER_LINEAR, dst=part, borderMode=cv2.BORDER_REPLICATE)
                clear = math.exp(-float(layer.depth[(a + b) // 2]) / around.weather.haze)
                cv2.convertScaleAbs(part, dst=part, alpha=gain * clear, beta=hazy * (1 - clear))
        if around.weather.sun > 0:
            _shade(wall, around, lens, layer, gains)
        numbers = np.arange(first, last, dtype=np.int16)[:, None]
        shown = numbers >= np.round(np.clip(layer.top, -1, 9999)).astype(np.int16)
        shown &= numbers < np.round(np.clip(layer.bottom, -1, 9999)).astype(np.int16)
        cv2.copyTo(wall[first:last], shown.view(np.uint8), image[first:last])

    def _buffers(self, lens: Lens) -> tuple[Image, NDArray[np.float32], NDArray[np.float32]]:
        """Scratch for one view: facades, and where their pixels lie in the textures."""
        found = self._scratch.get(lens.width)
        if found is None:
            shape = (lens.height, lens.width)
            found = np.empty((*shape, 3), np.uint8), np.empty(shape, np.float32), np.empty(shape, np.float32)
            self._scratch[lens.width] = found
        return found

    def _expose(self, image: Image, weather: Weather, rng: np.random.Generator) -> Image:
        """Lens blur, exposure, white balance, tone curve, sensor noise."""
        size = self.size
        image = cv2.GaussianBlur(image, (3, 3), float(rng.uniform(0.45, 0.8)))
        level = float(np.mean(cv2.mean(image)[:3]))  # automatic exposure evens out most of the scene's brightness
        gain = (118 / max(level, 20)) ** 0.65 * float(np.exp(rng.normal(0, 0.11)))
        contrast, gamma = float(rng.normal(1.0, 0.06)), float(np.exp(rng.normal(0, 0.08)))
        balance = gain * np.array(weather.tint) * np.exp(rng.normal(0, 0.03, 3))
        vivid = float(rng.normal(0.92, 0.08))
        colours = balance[:, None] * (vivid * np.eye(3) + (1 - vivid) * np.array((0.3, 0.59, 0.11)))
        image = cv2.transform(image, colours)
        curve = (np.arange(256) / 255) ** gamma
        image = cv2.LUT(image, (np.clip((curve - 0.45) * contrast + 0.45, 0, 1) * 255).astype(np.uint8))
        for sign, noise in enumerate(self.noise):
            a, b = (int(v) for v in rng.integers(0, size, 2))
            part = noise[a : a + size, b : b + size]
            image = cv2.subtract(image, part) if sign else cv2.add(image, part)
        return image


def _shade(wall: Image, around: Surroundings, lens: Lens, layer: Layer, gains: tuple[float, ...]) -> None:
    """Darkens what lies in the shadow of other buildings on the sunny facades; one ray to the sun every 4 columns."""
    weather = around.weather
    sun_x, sun_y = math.cos(weather.sun_angle) or 1e-9, math.sin(weather.sun_angle) or 1e-9
    facing = np.array([nx * sun_x + ny * sun_y > 0 for nx, ny in NORMALS])
    some = np.minimum(np.arange(2, lens.width + 2, 4), lens.width - 1)
    lit = facing[layer.side[some]] & layer.hit[some]
    if not lit.any():
        return
    out = np.array(NORMALS, np.float32)[layer.side[some]] * 0.05
    x, y = (layer.x[some] + out[:, 0])[lit, None], (layer.y[some] + out[:, 1])[lit, None]
    box = around.casters
    ax, bx = (box[:, 0] - x) / np.float32(sun_x), (box[:, 2] - x) / np.float32(sun_x)
    ay, by = (box[:, 1] - y) / np.float32(sun_y), (box[:, 3] - y) / np.float32(sun_y)
    enter = np.maximum(np.minimum(ax, bx), np.minimum(ay, by))
    leave = np.minimum(np.maximum(ax, bx), np.maximum(ay, by))
    height = box[:, 4] - enter * np.float32(math.tan(weather.sun_height))
    edge = np.full(len(some), lens.height, np.float32)
    tall = np.where((enter <= leave) & (enter > 0), height, 0).max(1, initial=0)
    edge[lit] = lens.horizon - (tall - lens.z) * layer.scale[some[lit]]
    edge = np.repeat(np.clip(edge, 0, lens.height), 4)[: lens.width].astype(np.int16)
    first = int(edge.min())
    dark = np.arange(first, lens.height, dtype=np.int16)[:, None] >= edge
    bright = [gain for gain in gains if gain > weather.ambient]
    part = wall[first:]
    cv2.copyTo(
        cv2.convertScaleAbs(part, alpha=weather.ambient * len(bright) / sum(bright)),
        dark.view(np.uint8),
        part,
    )


def _gains(weather: Weather) -> tuple[float, ...]:
    """Brightness of sunlit facades that look west, east, south, north."""
    x, y = math.cos(weather.sun_angle), math.sin(weather.sun_angle)
    direct = weather.sun * math.cos(weather.sun_height)
    return tuple(weather.ambient + direct * max(0.0, nx * x + ny * y) for nx, ny in NORMALS)


def _tilted(image: Image, size: int, focal: float, rng: np.random.Generator) -> Image:
    """The middle of a larger level view as a camera with a few degrees of pitch and roll would take it."""
    pitch = math.radians(float(np.clip(rng.normal(1.0, 2.5), -5, 5)))
    roll = math.radians(float(np.clip(rng.normal(0, 1.5), -3.5, 3.5)))
    focal_out = focal * float(rng.uniform(1.0, 1.06))
    wide = image.shape[1]
    back = np.array([[1 / focal_out, 0, -size / 2 / focal_out], [0, 1 / focal_out, -size / 2 / focal_out], [0, 0, 1]])
    c, s = math.cos(roll), math.sin(roll)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    c, s = math.cos(pitch), math.sin(pitch)
    nod = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    into = np.array([[focal, 0, wide / 2], [0, focal, wide / 2], [0, 0, 1.0]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(
        image, into @ nod @ turn @ back, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )


def _draw_ground(image: Image, around: Surroundings, lens: Lens) -> None:
    """Draws the ground plane in bands of rows, each from the patch whose texels are as large as its pixels."""
    weather = around.weather
    start = max(0, math.floor(lens.horizon))
    rows = np.arange(start, lens.height) + 0.5 - lens.horizon
    depth = lens.z * lens.focal / np.maximum(rows, 0.25)
    wanted = 1.0 / (depth / lens.focal * np.sqrt(depth / lens.z))  # texels a metre
    patches = around.ground
    densities = np.array([p.density for p in patches]).repeat(2) / np.tile((1, 2), len(patches))
    widest = math.sqrt(1 + (lens.width / 2 / lens.focal) ** 2)
    reach = np.repeat([(p.image.shape[0] / 2 - 2) / p.density for p in patches], 2) / widest
    reach[-1] = np.inf
    fits = (depth[:, None] < reach) & (densities < 1.5 * wanted[:, None])
    fits[:, -1] = True
    choice = np.argmax(fits, 1)
    gain = weather.ambient + weather.sun * math.sin(weather.sun_height)
    hazy = float(np.mean(SKY_COLOURS[weather.sky][1]))
    cuts = [0, *(np.flatnonzero(np.diff(choice)) + 1).tolist(), len(choice)]
    fx, fy = lens.forward
    for a, b in pairwise(cuts):
        if b <= a:
            continue
        patch = patches[int(choice[a]) // 2]
        if choice[a] % 2:
            patch = patch.half
        d = patch.density
        offset = start + a + 0.5 - lens.horizon
        # a pixel (i, j) of the band looks at the place (z f forward + z (i + 0.5 - w/2) right) / (j + offset)
        sx, sy = lens.z * d * fy, -lens.z * d * fx
        ox = lens.z * d * lens.focal * fx + sx * (0.5 - lens.width / 2)
        oy = lens.z * d * lens.focal * fy + sy * (0.5 - lens.width / 2)
        mx, my = (lens.x - patch.x) * d - 0.5, (lens.y - patch.y) * d - 0.5
        matrix = np.array([[sx, mx, ox + mx * offset], [sy, my, oy + my * offset], [0, 1, offset]])
        band = image[start + a : start + b]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpPerspective(
            patch.image, matrix, (lens.width, b - a), dst=band, flags=flags, borderMode=cv2.BORDER_REPLICATE
        )
        clear = math.exp(-float(depth[(a + b) // 2]) / weather.haze)
        cv2.convertScaleAbs(band, dst=band, alpha=gain * clear, beta=hazy * (1 - clear))
