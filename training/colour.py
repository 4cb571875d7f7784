"""Random changes of light and colour, for training sets of few years and seasons. Off in the paper's recipe."""

import numpy as np
import torch
from torch import Tensor

from shards.sampler import COLOUR_KEY, uniforms
from training.distributed import to_device
from training.model import IMAGENET_MEAN, IMAGENET_STD

_DRAWS = 6
_LUMA = np.array([0.299, 0.587, 0.114])
_PIVOT = 0.45


def colour_changes(seed: int, step: int, slots: np.ndarray, strength: float) -> tuple[Tensor, Tensor]:
    """Random affine maps of normalised colours for the slots (int [b]) of a step: float64 [b, 3, 3] and [b, 3].

    A function of (seed, step, slot). Brightness, contrast and saturation change by up to `strength`, each channel by
    up to half of it; contrast turns about a middle grey.
    """
    factor = 1 + strength * (2 * uniforms(seed, step, slots, COLOUR_KEY, _DRAWS) - 1)
    brightness, contrast, saturation = factor[:, 0], factor[:, 1], factor[:, 2]
    channels = 1 + (factor[:, 3:] - 1) / 2
    grey = np.broadcast_to(_LUMA, (3, 3))
    saturate = grey + saturation[:, None, None] * (np.eye(3) - grey)
    matrix = (contrast * brightness)[:, None, None] * saturate * channels[:, None, :]
    offset = np.outer((1 - contrast) * _PIVOT, np.ones(3))
    mean, deviation = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    inner = matrix * deviation / deviation[:, None]
    shift = (matrix @ mean + offset - mean) / deviation
    return torch.from_numpy(inner), torch.from_numpy(shift)


def change_colours(images: Tensor, changes: tuple[Tensor, Tensor]) -> Tensor:
    """`images` [b, 3, H, W], normalised, with the colours of each mapped by `changes` (of `colour_changes`)."""
    matrix, shift = (to_device(change.to(images.dtype), images.device) for change in changes)
    batch, _, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).reshape(batch, height * width, 3)
    changed = torch.baddbmm(shift[:, None, :], pixels, matrix.transpose(1, 2))
    return changed.view(batch, height, width, 3).permute(0, 3, 1, 2)
