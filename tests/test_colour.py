"""Changes of light and colour: a function of the slot, and the formula that they state."""

import numpy as np
import torch

from training.colour import change_colours, colour_changes
from training.model import IMAGENET_MEAN, IMAGENET_STD, to_input

PHOTOS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8))
MEAN, DEVIATION = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)


def test_a_strength_of_nothing_changes_nothing():
    images = to_input(PHOTOS, torch.float64)
    changed = change_colours(images, colour_changes(1, 2, np.arange(4), 0.0))
    torch.testing.assert_close(changed, images)


def test_a_change_is_gain_then_saturation_then_contrast_about_middle_grey():
    slots = np.array([1, 5, 6, 7])
    changed = change_colours(to_input(PHOTOS, torch.float64), colour_changes(3, 9, slots, 0.3))
    bits = np.random.Philox(key=np.array([3, 2**64 - 2], np.uint64), counter=[0, 9, 0, 0])
    u = ((bits.random_raw(8 * 6) >> np.uint64(11)) * 2.0**-53).reshape(8, 6)[slots]
    for i in range(4):
        b, c, s, *gain = 1 + 0.3 * (2 * u[i] - 1)
        pixels = PHOTOS[i].numpy() / 255 * (1 + (np.array(gain) - 1) / 2) * b
        grey = (pixels * [0.299, 0.587, 0.114]).sum(-1, keepdims=True)
        expected = c * (grey + s * (pixels - grey)) + (1 - c) * 0.45
        np.testing.assert_allclose(changed[i].permute(1, 2, 0).numpy() * DEVIATION + MEAN, expected, atol=1e-6)


def test_ranks_change_their_slots_as_one_process_does():
    whole = colour_changes(1, 2, np.arange(8), 0.4)
    for rank in range(3):
        part = colour_changes(1, 2, np.arange(rank, 8, 3), 0.4)
        torch.testing.assert_close(part[0], whole[0][rank::3], rtol=0, atol=0)
        torch.testing.assert_close(part[1], whole[1][rank::3], rtol=0, atol=0)
