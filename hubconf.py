"""Models for torch.hub: `torch.hub.load(REPOSITORY, "localiser", checkpoint="RUN")`."""

dependencies = ["torch", "torchvision", "numpy", "pyarrow", "safetensors", "utm", "tyro", "PIL", "fsspec", "tqdm"]

from pathlib import Path  # noqa: E402

from evaluation.localiser import Localiser  # noqa: E402
from training.model import GeoModel  # noqa: E402


def localiser(checkpoint: str | Path, device: str = "cpu") -> Localiser:
    """A checkpoint that answers: `describe` photos and `answer` with ranked cells."""
    return Localiser.from_pretrained(checkpoint, device)


def model(checkpoint: str | Path, device: str = "cpu") -> GeoModel:
    """The network alone: images float32 [B, 3, H, W], ImageNet-normalised, to unit descriptors [B, D]."""
    return localiser(checkpoint, device).model
