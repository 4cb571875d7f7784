"""The training photos of a cell that look most like a query, described when they are asked for."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from torch import Tensor

from evaluation.places import Place
from evaluation.thumbnails import data_url
from shards.classes import ClassTable
from shards.console import JobError
from shards.sample_photos import SamplePhoto, SamplePhotos
from training.queries import decode_query

_COMPARED = 24
_SHOWN = 4
_PIXELS = 320


class KnownPhotos:
    """Training photos out of a data set, for the cells of a checkpoint's class map.

    Raises JobError where the data set has none of the checkpoint's cells.
    """

    def __init__(self, samples: SamplePhotos, classes: ClassTable) -> None:
        self.samples = samples
        self.classes = classes
        if not samples.covers(classes):
            raise JobError(f"--shards {samples.dataset.place}: has none of the checkpoint's cells")

    def nearest(
        self, place: Place, query: Tensor, shorter_side: int, describe: Callable[[Sequence[np.ndarray]], Future[Tensor]]
    ) -> list[dict[str, Any]]:
        """Photos of the place's cell, the most alike first, ready for JSON; `query` is a descriptor float32 [D].

        Compared are up to 24 photos of the cell, those that can be read. Each comes as a small JPEG in a `data:` URL,
        with its UTM metres, heading in degrees, timestamp, and likeness (cosine of the descriptors). Raises JobError
        for a damaged table of samples, OSError where none of the photos can be read.
        """
        M = self.classes.M
        cell = (math.floor(place.east / M) * M, math.floor(place.north / M) * M)
        found: list[tuple[SamplePhoto, bytes, np.ndarray]] = []
        damage: OSError | None = None
        for photo in self.samples.some_of_cell(cell, M, _COMPARED):
            try:
                jpeg = photo.read()
                found.append((photo, jpeg, decode_query(io.BytesIO(jpeg), shorter_side)))
            except OSError as error:
                damage = error
        if damage and not found:
            raise damage
        if not found:
            return []
        likeness = (describe([image for _, _, image in found]).result() @ query).tolist()
        best = sorted(zip(likeness, found, strict=True), key=lambda pair: -pair[0])[:_SHOWN]
        return [
            {
                "picture": data_url(jpeg, _PIXELS),
                "likeness": alike,
                "east": photo.east,
                "north": photo.north,
                "heading": photo.heading,
                "timestamp": photo.timestamp,
            }
            for alike, (photo, jpeg, _) in best
        ]
