"""What a step trains on: a pure function of (seed, step, slot, attempt). The sampler keeps no state.

A class is drawn uniformly among the group's classes that have photos, then a photo uniformly within it, with
replacement; the crop comes from the same draw and has the distribution of torchvision's RandomResizedCrop
(ten tries of area and aspect ratio, then the whole photo).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.index import GroupIndex

Schedule = Callable[[int], np.ndarray]
"""The group of every slot of a step's global batch, int [batch size]."""

# What random numbers are for, as keys of `philox`; attempts of a slot's draw are the small ones.
WINDOW_KEY = 0xFFFFFFFFFFFFFFFF
COLOUR_KEY = 0xFFFFFFFFFFFFFFFE
ROUND_KEY = 0xFFFFFFFFFFFFFFFD  # less the number of a group

_DRAWS = 24  # class, photo, crop x, crop y, ten pairs of area and ratio
_LEAST_AREA, _WIDEST = 0.66, 4 / 3  # of a crop: share of its photo's area, aspect ratio (and its inverse)


@dataclass(frozen=True)
class Draws:
    """The samples of some slots: group, label, row of the group's index (int64 [K]) and uniforms for the crop.

    `crops` turns the uniforms into boxes once a photo's size is known.
    """

    group: np.ndarray
    label: np.ndarray
    row: np.ndarray
    uniform: np.ndarray


def philox(seed: int, key: int, counter: int) -> Callable[[int], np.ndarray]:
    """A stream of uniform numbers in [0, 1): called with n, the next n of them, float64 [n].

    Streams of other keys or counters are independent. `random_raw` is a stream that NumPy never changes.
    """
    bits = np.random.Philox(key=np.array([seed, key], np.uint64), counter=[0, counter, 0, 0])
    return lambda n: (bits.random_raw(n) >> np.uint64(11)) * 2.0**-53


def slots_of_rank(batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The slots of the global batch that a rank owns: rank, rank + world_size, ..."""
    return np.arange(rank, batch_size, world_size)


def uniforms(seed: int, step: int, slots: np.ndarray, key: int = 0, draws: int = _DRAWS) -> np.ndarray:
    """Uniform numbers in [0, 1) for some slots of a step's global batch, float64 [K, draws].

    `key`: what they are for, of samples the attempt. A slot's numbers do not depend on how many slots or ranks there
    are.
    """
    count = int(slots.max(initial=-1)) + 1
    return philox(seed, key, step)(count * draws).reshape(count, draws)[slots]


@dataclass(frozen=True)
class IndexedSampler:
    """Draws single photos, exactly class-uniform, from a data set's index."""

    index: dict[int, GroupIndex]
    seed: int

    def draw(self, step: int, slots: np.ndarray, groups: np.ndarray, attempt: int = 0) -> Draws:
        """Draw the samples of some slots of a step's global batch.

        `groups` int [K] is the group of each slot of `slots` int [K]; `attempt` counts replacements of a slot whose
        earlier sample could not be read.
        """
        u = uniforms(self.seed, step, slots, attempt)
        label = np.empty(len(slots), np.int64)
        row = np.empty(len(slots), np.int64)
        for group in np.unique(groups):
            chosen = np.flatnonzero(groups == group)
            of_group = self.index[int(group)]
            label[chosen] = of_group.labels[(u[chosen, 0] * len(of_group.labels)).astype(np.int64)]
            first = of_group.starts[label[chosen]]
            count = of_group.starts[label[chosen] + 1] - first
            row[chosen] = first + (u[chosen, 1] * count).astype(np.int64)
        return Draws(np.asarray(groups, np.int64), label, row, u[:, 2:])


def crops(uniform: np.ndarray, side: int) -> np.ndarray:
    """Crop boxes in pixels of square photos, int64 [K, 4]: left, top, width, height; `uniform` float64 [K, 22]."""
    area = uniform[:, 2::2] * (1 - _LEAST_AREA) + _LEAST_AREA
    low, high = -math.log(_WIDEST), math.log(_WIDEST)
    ratio = np.exp(uniform[:, 3::2] * (high - low) + low)
    w = np.rint(np.sqrt(area * (side * side) * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area * (side * side) / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= side) & (h > 0) & (h <= side)
    first = np.argmax(fits, axis=1)
    some = np.arange(len(first))
    w, h = (np.where(fits[some, first], length[some, first], side) for length in (w, h))
    left = (uniform[:, 0] * (side - w + 1)).astype(np.int64)
    top = (uniform[:, 1] * (side - h + 1)).astype(np.int64)
    return np.stack([left, top, w, h], axis=1)
