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
from evaluation.sample_photos import SamplePhotos
from evaluation.thumbnails import data_url
from shards.classes import ClassTable
from shards.console import JobError
from training.queries import decode_query

_COMPARED = 24
_SHOWN = 4
_PIXELS = 320


class KnownPhotos:
    """Training photos out of a data set, for the cells of a checkpoint's class map; none without a data set.

    Raises JobError where the data set has none of the checkpoint's cells.
    """

    def __init__(self, samples: SamplePhotos, classes: ClassTable) -> None:
        self.samples = samples
        self.classes = classes
        if samples.dataset is not None and not samples.covers(classes):
            raise JobError(f"--shards {samples.dataset.place}: has none of the checkpoint's cells")

    def __bool__(self) -> bool:
        return self.samples.dataset is not None

    def nearest(
        self, place: Place, query: Tensor, shorter_side: int, describe: Callable[[Sequence[np.ndarray]], Future[Tensor]]
    ) -> list[dict[str, Any]]:
        """Photos of the place's cell, the most alike first, ready for JSON; `query` is a descriptor float32 [D].

        Compared are up to 24 photos of the cell. Each comes as a small JPEG in a `data:` URL, with its UTM metres,
        heading in degrees, timestamp, and likeness (cosine of the descriptors). Raises OSError where shards cannot
        be read, or hold no photo where one should be.
        """
        M = self.classes.M
        cell = (math.floor(place.east / M) * M, math.floor(place.north / M) * M)
        photos = self.samples.some_of_cell(cell, M, _COMPARED)
        if not photos:
            return []
        images = [decode_query(io.BytesIO(photo.jpeg), shorter_side) for photo in photos]
        likeness = (describe(images).result() @ query).tolist()
        best = sorted(range(len(photos)), key=lambda i: -likeness[i])[:_SHOWN]
        return [
            {
                "picture": data_url(photos[i].jpeg, _PIXELS),
                "likeness": likeness[i],
                "east": photos[i].east,
                "north": photos[i].north,
                "heading": photos[i].heading,
                "timestamp": photos[i].timestamp,
            }
            for i in best
        ]
