"""Photos to batches: this project's loader, CosPlace's and OpenVPRLab's; rows of `peers.py`."""

from __future__ import annotations

import csv
import os
import shutil
import statistics
from collections.abc import Callable, Generator, Iterator
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from loader import rate
from loader_peers import BATCH, SIZE, write_files
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import RandAugment

from preprocessing.build import build
from preprocessing.city.plan import CitySettings
from preprocessing.city.writer import render_city
from preprocessing.plan import Settings
from preprocessing.shard_run import Machinery
from shards.console import JobError
from shards.dataset import Dataset
from shards.loader import Loader
from training.colour import change_colours, colour_changes
from training.model import to_input

LARGE = 512  # pixels of a photo, as CosPlace's data set asserts
COLOUR, HUE = 0.7, 0.5  # CosPlace's defaults
AREA = 0.34  # most that a random crop takes away: ours is fixed
BYTES = "crop, as bytes"
A_PLACE = 4  # photos that OpenVPRLab draws of a place
ROUNDS, SECONDS = 3, 2.0


@dataclass(frozen=True)
class Side:
    """A way to load: photos and images of so many pixels, and a maker of its endless batches."""

    name: str
    photo_pixels: int
    image_pixels: int
    done: str
    make: Callable[[], Iterator[Tensor]]


def loading_rows(code: dict[str, list[Any]], photos: Path | None, scratch: Path) -> list[dict[str, object]]:
    """Images a second of ours and of the peers in `code`, in turn.

    Raises `JobError` where the photos are too few or of another size.
    """
    if photos is None:
        render_city(scratch / "city", CitySettings(blocks=1, size=LARGE, years=1, val_queries=1, test_queries=1), 1)
        photos = scratch / "city" / "train" / "database"
    sides: list[Side] = []
    shards = {pixels: scratch / f"shards-{pixels}" for pixels in (SIZE, LARGE)}
    for pixels, out in shards.items():
        build(photos, out, Settings(20, 1, 10, pixels, 90, "fast", 0), Machinery(1))
        for done in ("crop", "colour", BYTES):
            sides.append(Side("loading-ours", pixels, SIZE, done, partial(ours, out, done)))
    if "cosplace" in code:
        train_dataset, commons = code["cosplace"]
        sides += cosplace_sides(train_dataset, commons, photos.resolve(), scratch)
    if "openvprlab" in code:
        config_manager, vpr_datamodule = code["openvprlab"]
        sides += openvprlab_sides(config_manager, vpr_datamodule, shards, scratch)
    rates: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, measured in zip(sides, rates, strict=True):
            batches = counted(side)
            measured.append(rate(batches, SECONDS, ahead=4 if side.name == "loading-ours" else 1))
            batches.close()
    return [
        {
            "name": side.name, "photo_pixels": side.photo_pixels, "image_pixels": side.image_pixels, "done": side.done,
            "images_per_second": statistics.median(measured),
        }
        for side, measured in zip(sides, rates, strict=True)
    ]  # fmt: skip


def counted(side: Side) -> Generator[int, None, None]:
    """The sizes of a side's batches, which are float32 [B, 3, S, S] (bytes: uint8 [B, S, S, 3]) or the run fails."""
    S = side.image_pixels
    wanted = (torch.uint8, (S, S, 3)) if side.done == BYTES else (torch.float32, (3, S, S))
    for images in side.make():
        assert (images.dtype, images.shape[1:]) == wanted
        yield len(images)


def ours(shards: Path, done: str) -> Iterator[Tensor]:
    """Batches as our training makes them: crops of the loader's threads, then floats, normalised, colours changed."""
    dataset = Dataset.open(shards)
    groups = np.full(BATCH, dataset.classes.groups[0])
    loader = Loader(dataset, lambda _: groups, batch_size=BATCH, image_size=SIZE, seed=0, decoder="cpu", threads=1)
    try:
        for batch in loader.batches(0, 1_000_000):
            images = batch.images if done == BYTES else to_input(batch.images)
            if done == "colour":
                images = change_colours(images, colour_changes(0, batch.step, np.arange(BATCH), COLOUR))
            yield images
    finally:
        loader.close()


def cosplace_sides(train_dataset: Any, commons: Any, photos: Path, scratch: Path) -> list[Side]:
    """What CosPlace does by default, and its augmentation on the CPU with none, some and all of its colours."""
    first = next(photos.rglob("*.jpg"))
    with Image.open(first) as photo:
        if photo.size != (LARGE, LARGE):
            raise JobError(f"{first}: {photo.size[0]} x {photo.size[1]} pixels; CosPlace reads {LARGE} x {LARGE} only")

    def batches(device: str, colour: float, hue: float) -> Iterator[Tensor]:
        arguments = SimpleNamespace(
            augmentation_device=device, image_size=SIZE, random_resized_crop=AREA,
            brightness=colour, contrast=colour, saturation=colour, hue=hue,
        )  # fmt: skip
        with chdir(scratch):  # it keeps its list of photos in cache/
            dataset = train_dataset.TrainDataset(arguments, str(photos), N=1, L=1, min_images_per_class=1)
        if len(dataset) < BATCH:
            raise JobError(
                f"{photos}: photos of {len(dataset)} places and directions; a batch needs {BATCH}: give more"
            )
        for images, _, _ in commons.InfiniteDataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True):
            yield images

    return [
        Side("loading-cosplace", LARGE, LARGE, "none", partial(batches, "cuda", 0, 0)),
        Side("loading-cosplace", LARGE, SIZE, "crop", partial(batches, "cpu", 0, 0)),
        Side("loading-cosplace", LARGE, SIZE, "colour", partial(batches, "cpu", COLOUR, 0)),
        Side("loading-cosplace", LARGE, SIZE, "colour, hue", partial(batches, "cpu", COLOUR, HUE)),
    ]


def openvprlab_sides(config_manager: Any, vpr_datamodule: Any, shards: dict[int, Path], scratch: Path) -> list[Side]:
    """From files with the same bytes as the shards' photos."""

    def batches(folder: Path, augment: bool) -> Iterator[Tensor]:
        config_manager.get_dataset_path = lambda **_: str(folder)  # where a file of the checkout would name it
        data = vpr_datamodule.VPRDataModule(
            "gsv-cities", "all", (SIZE, SIZE), BATCH // A_PLACE, A_PLACE, num_workers=0, val_set_names=[]
        )
        if not augment:
            transforms = data.train_transform.transforms
            data.train_transform.transforms = [t for t in transforms if not isinstance(t, RandAugment)]
        loader = data.train_dataloader()
        while True:  # an epoch after the other, without reading the tables anew
            for images, _ in loader:
                yield images.flatten(0, 1)

    sides = []
    for pixels, of_size in shards.items():
        write_files(of_size, scratch / "files")
        folder = scratch / f"gsv-{pixels}"
        write_gsv_cities(scratch / "files", folder)
        shutil.rmtree(scratch / "files")
        for done in ("resize", "RandAugment"):
            make = partial(batches, folder, done == "RandAugment")
            sides.append(Side("loading-openvprlab", pixels, SIZE, done, make))
    return sides


def write_gsv_cities(files: Path, folder: Path) -> None:
    """The photos of `files` (a folder a class), linked and listed as GSV-Cities has them: eight photos a place, and a
    whole number of batches of places."""
    images, tables = folder / "Images" / "Tiny", folder / "Dataframes"
    images.mkdir(parents=True)
    tables.mkdir()
    places = [
        photos[first : first + 2 * A_PLACE]
        for photos in (sorted(of_class.iterdir()) for of_class in sorted(files.iterdir()))
        for first in range(0, len(photos) - 2 * A_PLACE + 1, 2 * A_PLACE)
    ]
    a_batch = BATCH // A_PLACE
    if len(places) < a_batch:
        raise JobError(
            f"{len(places)} places of {2 * A_PLACE} photos; a batch of OpenVPRLab needs {a_batch}: give more"
        )
    with (tables / "Tiny.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid"])
        for place, photos in enumerate(places[: len(places) // a_batch * a_batch]):
            for number, photo in enumerate(photos):
                table.writerow([place, 2011, 7, 90, "Tiny", 45.5, 7.5, f"pano{number}"])
                os.link(photo, images / f"Tiny_{place:07}_2011_07_090_45.5_7.5_pano{number}.jpg")
