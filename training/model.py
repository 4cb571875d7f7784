"""The model: backbone, global average pool, linear layer, descriptor of unit length."""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.backbones import BackboneName, make_backbone

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class GeoModel(nn.Module):
    """Images to descriptors of unit length; Divide&Classify, section 3.

    `weights` and `freeze_until` as `make_backbone` takes them. `descriptor_dim` None is the reference's: as
    many numbers as the backbone has channels. Raises what `make_backbone` raises.
    """

    def __init__(
        self,
        backbone: BackboneName = "efficientnet_b0",
        weights: str = "imagenet",
        freeze_until: int = 0,
        descriptor_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = make_backbone(backbone, weights, freeze_until)
        channels = self.backbone.out_channels
        self.descriptor_dim = descriptor_dim or channels
        self.projection = nn.Linear(channels, self.descriptor_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Descriptors [B, descriptor_dim] of unit length in float32 (float64 for a float64 model), under any
        autocast.

        `images` [B, 3, H, W] as `to_input` makes them.
        """
        pooled = self.backbone(images).mean(dim=(2, 3))
        descriptors = self.projection(pooled)
        if descriptors.dtype in (torch.float16, torch.bfloat16):
            descriptors = descriptors.float()
        return F.normalize(descriptors, dim=1)


def fold_batch_norms(model: nn.Module) -> None:
    """Put every batch norm after a convolution into the convolution's weights, in place; `model` in evaluation mode.

    The answers stay the same but for rounding. Children are taken to run in the order in which they were registered,
    as those of all our backbones do.
    """
    for module in list(model.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, nn.Identity())


def to_input(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, H, W, 3] RGB to [B, 3, H, W] in `dtype`, ImageNet-normalised, channels-last in memory, same
    device.

    Raises ValueError for another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}")
    batch, height, width, _ = images.shape
    scale, shift = _scale_and_shift(width, dtype, images.device)
    # Whole rows of pixels at once: three channels alone are too short a last dimension to be fast on a CPU.
    rows = images.reshape(batch, height, width * 3).to(dtype).mul_(scale).add_(shift)
    return rows.view(batch, height, width, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is made in that mode, validation's, could not be used in training
def _scale_and_shift(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors and summands of a row of pixels, [width * 3]; kept, since bringing them to a GPU waits for its work."""
    deviation = torch.tensor(IMAGENET_STD, dtype=dtype)
    scale, shift = 1 / (255 * deviation), -torch.tensor(IMAGENET_MEAN, dtype=dtype) / deviation
    return scale.to(device).repeat(width), shift.to(device).repeat(width)
