"""What a photo shows, whatever its file's way of storing it."""

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """The photo in RGB, upright by its EXIF tag; grey of 16 bits keeps the upper 8.

    `image` itself may be turned. Raises ValueError for pixels of 32 bits, and what Pillow raises for a photo that is
    damaged.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose black and white are not known")
    return image.convert("RGB")
