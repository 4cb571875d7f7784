"""What a view of a procedural city is: a camera, and what stands around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.city.ground import Patch
from preprocessing.city.plan import Panorama, Weather
from preprocessing.city.scenery import Car, Figure

Row = NDArray[np.floating[Any]]


@dataclass
class Surroundings:
    """What all views from one panorama share."""

    pano: Panorama
    weather: Weather
    visible: NDArray[np.intp]  # buildings that some ray meets or sees over the roofs
    casters: NDArray[np.float32]  # boxes that may throw shadows
    ground: list[Patch]
    cars: list[Car]
    figures: list[Figure]


@dataclass
class Lens:
    """A level view: image size in pixels, focal length, horizon row, camera place and direction."""

    width: int
    height: int
    focal: float
    horizon: float
    x: float
    y: float
    z: float
    angle: float

    @property
    def forward(self) -> tuple[float, float]:
        return math.cos(self.angle), math.sin(self.angle)
