"""Renders a city's photos into a folder laid out and named as SF-XL, on all cores."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import simplejpeg
import utm
from tqdm import tqdm

from preprocessing.city.plan import BAND, CELL, MIN_PHOTOS_PER_CELL, ZONE, CitySettings, Panorama, Plan
from preprocessing.city.streetview import Renderer
from shards.console import JobError, format_bytes, format_count, format_duration
from shards.files import TEMPORARY_SUFFIX, atomic_write_json, is_partial, named, remove_partials
from shards.names import PhotoName, format_name
from shards.provenance import provenance
from shards.workers import run_tasks

RECORD = "city.json"
FORMAT = 1
"""Raised whenever the same settings would give other photos."""
TASK = 24
"""Panoramas a task; neighbours share textures."""


@dataclass(frozen=True)
class Written:
    """Photos and bytes that one task found or wrote."""

    photos: int
    bytes: int


def photo_path(plan: Plan, pano: Panorama, number: int) -> str:
    """Path under the city's folder of the photo of a panorama's heading, named as SF-XL names its photos.

    Latitude and longitude are those of the UTM position as the name gives it, to centimetres.
    """
    east, north = (round(v, 2) for v in plan.to_utm(pano.x, pano.y))
    latitude, longitude = (float(v) for v in utm.to_latlon(east, north, ZONE, BAND))
    name = format_name(
        PhotoName(
            east=east,
            north=north,
            zone=ZONE,
            band=BAND,
            latitude=latitude,
            longitude=longitude,
            pano=pano.pano_id,
            heading=round(pano.headings[number]) % 360,
            timestamp=plan.name_month(pano),
        )
    )
    if pano.split == "train":
        return f"train/database/{math.floor(latitude * 100) / 100:.2f}/{name}"
    return f"{pano.split}/queries/{name}"


def render_city(out: Path, settings: CitySettings, workers: int) -> dict[str, Any]:
    """Renders every photo of a city under `out` and returns the record that `city.json` keeps.

    A city that is complete is left alone; one that was interrupted goes on where it stopped. The photos' bytes do
    not depend on `workers`. Raises `JobError` where `out` holds something else.
    """
    record = _claim(out, settings)
    if record["complete"]:
        print(f"{out} is already complete: {format_count(record['photos']['total'])} photos")
        return record
    began = time.perf_counter()
    plan = Plan(settings)
    total = sum(len(pano.headings) for pano in plan.panoramas)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(out / RECORD, record)
    for pano in plan.panoramas:
        (out / photo_path(plan, pano, 0)).parent.mkdir(parents=True, exist_ok=True)
    tasks = [range(a, min(a + TASK, len(plan.panoramas))) for a in range(0, len(plan.panoramas), TASK)]
    written = _run(out, settings, tasks, total, workers)
    remove_partials(out)
    if sum(w.photos for w in written) != total:
        raise JobError(f"{out}: not all photos were written; run the same command again")
    record |= _summary(plan, sum(w.bytes for w in written)) | {"complete": True, "provenance": provenance()}
    atomic_write_json(out / RECORD, record)
    _tell(out, record, time.perf_counter() - began)
    return record


def _claim(out: Path, settings: CitySettings) -> dict[str, Any]:
    """The record of `out`: of this very city, finished or begun, or a new one in an empty folder."""
    chosen = asdict(settings)
    wanted: dict[str, Any] = {"format": FORMAT, "settings": chosen}
    path = out / RECORD
    if out.exists() and not out.is_dir():
        raise JobError(f"{out}: is a file; choose another --out")
    if path.exists():
        try:
            record = json.loads(path.read_text())
            held = {"format": record["format"], "settings": record["settings"]}
            complete = bool(record["complete"])
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(f"{path}: cannot be read ({error}); choose another --out or delete it") from error
        if held != wanted:
            differ = [k for k, v in chosen.items() if held["settings"].get(k) != v] or ["format"]
            raise JobError(f"{out}: holds a city of other settings ({', '.join(differ)}); choose another --out")
        whole = complete and sum(1 for _ in out.rglob("*.jpg")) >= record["photos"]["total"]
        return dict(record) if whole else wanted | {"complete": False}
    if out.exists() and not all(is_partial(path.name) for path in out.iterdir()):
        raise JobError(f"{out}: holds other files and no {RECORD}; choose another --out or an empty folder")
    return wanted | {"complete": False}


class _Task:
    """Renders panoramas by number; each worker process keeps one."""

    def __init__(self, out: Path, settings: CitySettings) -> None:
        self.out = out
        self.plan = Plan(settings)
        self.renderer = Renderer(self.plan)

    def run(self, numbers: range) -> Written:
        photos = size = 0
        for number in numbers:
            pano = self.plan.panoramas[number]
            paths = [self.out / photo_path(self.plan, pano, k) for k in range(len(pano.headings))]
            around = None
            for k, path in enumerate(paths):
                if path.exists():  # a run that was interrupted left it; files appear whole
                    size += path.stat().st_size
                else:
                    around = around or self.renderer.look_around(pano)
                    image = self.renderer.photo(around, k)
                    data = simplejpeg.encode_jpeg(image, self.plan.settings.quality, "RGB", "420", fastdct=False)
                    unfinished = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
                    with named(path, unfinished):
                        unfinished.write_bytes(data)
                        os.rename(unfinished, path)
                    size += len(data)
                photos += 1
        return Written(photos, size)


@lru_cache(1)
def _task(out: Path, settings: CitySettings) -> _Task:
    return _Task(out, settings)


def _work(out: Path, settings: CitySettings, numbers: range) -> Written:
    cv2.setNumThreads(1)
    return _task(out, settings).run(numbers)


def _run(out: Path, settings: CitySettings, tasks: list[range], total: int, workers: int) -> list[Written]:
    written: list[Written] = []
    threads = cv2.getNumThreads()
    with tqdm(total=total, unit="photo", desc="rendering", smoothing=0.05) as bar:
        try:
            for part in run_tasks([partial(_work, out, settings, numbers) for numbers in tasks], workers):
                written.append(part)
                bar.update(part.photos)
        finally:
            cv2.setNumThreads(threads)
    return written


def _summary(plan: Plan, size: int) -> dict[str, Any]:
    """Counts of a finished city."""
    photos = dict.fromkeys(("train", "val", "test"), 0)
    cells: dict[tuple[int, int], int] = {}
    for pano in plan.panoramas:
        photos[pano.split] += len(pano.headings)
        if pano.split == "train":
            cell = plan.cell_of(pano.x, pano.y)
            cells[cell] = cells.get(cell, 0) + len(pano.headings)
    full = sum(n >= MIN_PHOTOS_PER_CELL for n in cells.values())
    years = {"train": list(plan.calendar[:-2]), "val": [plan.calendar[-2]], "test": [plan.calendar[-1]]}
    return {
        "photos": photos | {"total": sum(photos.values())},
        "bytes": size,
        "cells": {
            "side_m": CELL,
            "min_photos": MIN_PHOTOS_PER_CELL,
            "count": full,
            "with_fewer": len(cells) - full,
        },
        "years": years,
        "example": photo_path(plan, plan.panoramas[0], 0),
    }


def _tell(out: Path, record: dict[str, Any], seconds: float) -> None:
    photos, cells = record["photos"], record["cells"]
    total = photos["total"]
    train = ", ".join(map(str, record["years"]["train"]))
    print(f"{out}: {format_count(total)} photos in {format_duration(seconds)} ({total / seconds:.0f} photos/s)")
    print(
        f"  train  {format_count(photos['train']):>8} photos of {train}, in {cells['count']} cells of {CELL} m with at"
    )
    print(f"                  least {cells['min_photos']} photos each ({cells['with_fewer']} cells have fewer)")
    for split in ("val", "test"):
        print(f"  {split:<5}  {format_count(photos[split]):>8} queries of {record['years'][split][0]}")
    print(f"  bytes  {format_bytes(record['bytes'])}, {format_bytes(record['bytes'] / total)} a photo")
    print(f"  such as {record['example']}")
