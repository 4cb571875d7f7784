"""Backbones: torchvision's EfficientNets and ResNets without their classifiers, and a small one for CPUs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shards.console import JobError, first_line

BackboneName = Literal["efficientnet_b0", "efficientnet_b5", "efficientnet_b7", "resnet18", "resnet50", "small_cnn"]

RESNET_CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


class Backbone(nn.Sequential):
    """Images [B, 3, H, W], normalised, to a feature map [B, out_channels, h, w]; children are stages."""

    def __init__(self, *stages: nn.Module, out_channels: int) -> None:
        super().__init__(*stages)
        self.out_channels = out_channels


@dataclass(frozen=True)
class _Torchvision:
    build: Callable[..., nn.Module]  # torchvision's model
    pretrained: Any  # its ImageNet weights, a member of torchvision's enum
    channels: int
    stages: tuple[str, ...]  # the names of our children in torchvision's model, in order


_CHANNELS = {
    "efficientnet_b0": 1280,
    "efficientnet_b5": 2048,
    "efficientnet_b7": 2560,
    "resnet18": 512,
    "resnet50": 2048,
}


def _torchvision(name: str) -> _Torchvision:
    """A backbone as torchvision has it, which is imported here: it takes two seconds, which `--help` does without."""
    from torchvision import models

    build = getattr(models, name)
    pretrained = models.get_model_weights(build)["IMAGENET1K_V1"]
    stages = RESNET_CHILDREN if name.startswith("resnet") else tuple(f"features.{i}" for i in range(9))
    return _Torchvision(build, pretrained, _CHANNELS[name], stages)


def make_backbone(name: BackboneName, weights: str = "imagenet", freeze_until: int = 0) -> Backbone:
    """A backbone, its first `freeze_until` children frozen.

    `weights`: "imagenet" (torchvision's, through the cache of torch.hub), "none" (random), or a file:
    safetensors or a PyTorch pickle with torchvision's names (a classifier is left out) or ours. Frozen
    children take no gradients; in training mode their batch-norm statistics still move and their stochastic
    depth still drops, as in the reference.

    Raises JobError for weights that cannot be had or do not fit, and ValueError for an unknown name or a
    `freeze_until` that is not between 0 and the number of children.
    """
    if name not in get_args(BackboneName):
        raise ValueError(f"backbone {name!r} is none of {', '.join(get_args(BackboneName))}")
    backbone = _torchvision_backbone(_torchvision(name)) if name in _CHANNELS else _small_cnn()
    if not 0 <= freeze_until <= len(backbone):
        raise ValueError(f"{name} has {len(backbone)} children: it cannot be frozen until {freeze_until}")
    if weights == "imagenet":
        backbone.load_state_dict(_fitting(_imagenet(name), name, backbone, "imagenet weights"))
    elif weights != "none":
        backbone.load_state_dict(_fitting(_read(Path(weights)), name, backbone, weights))
    for child in list(backbone)[:freeze_until]:
        child.requires_grad_(False)
    return backbone


def _torchvision_backbone(theirs: _Torchvision) -> Backbone:
    model = theirs.build(weights=None)
    return Backbone(*(model.get_submodule(stage) for stage in theirs.stages), out_channels=theirs.channels)


def _small_cnn() -> Backbone:
    widths = (3, 32, 64, 128, 256, 384)
    strides = (2, 2, 2, 2, 1)
    stages = [
        nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        )
        for before, after, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    backbone = Backbone(*stages, out_channels=widths[-1])
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _imagenet(name: str) -> Mapping[str, Any]:
    if name not in _CHANNELS:
        raise JobError(f"{name} has no ImageNet weights: use --weights none, or --weights FILE")
    pretrained = _torchvision(name).pretrained
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(pretrained.url).path).name
    try:
        state: Mapping[str, Any] = pretrained.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        if cached.exists():
            raise JobError(
                f"{cached}: not readable as weights ({first_line(error)}); remove it and try again"
            ) from error
        raise JobError(
            f"ImageNet weights of {name} cannot be downloaded ({first_line(error)}): fetch {pretrained.url} "
            f"elsewhere and place it at {cached}, or name it by --weights FILE, or start from --weights none "
            "--freeze-until 0"
        ) from error
    return state


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise JobError(f"--weights {path}: no such file (and neither imagenet nor none)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle raises whatever its bytes happen to say
        raise JobError(f"{path}: not readable as weights ({first_line(error)})") from error
    for wrapper in ("model_state_dict", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise JobError(f"{path}: holds a {type(state).__name__}, not weights by name")
    return state


def _fitting(state: Mapping[str, Any], name: str, backbone: Backbone, origin: str) -> dict[str, Tensor]:
    stages = _torchvision(name).stages if name in _CHANNELS else ()
    numbers = {f"{stage}.": f"{number}." for number, stage in enumerate(stages)}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        bare = str(key).removeprefix("module.").removeprefix("backbone.")
        stage = next((stage for stage in numbers if bare.startswith(stage)), "")
        found[numbers.get(stage, "") + bare.removeprefix(stage)] = value
    wanted = backbone.state_dict()
    way_out = f"give weights of {name}, or --weights none"
    for key, tensor in wanted.items():
        value = found.get(key)
        if value is None and key.endswith("num_batches_tracked"):
            found[key] = tensor  # old files have none, and nothing here reads it
            continue
        if not isinstance(value, Tensor):
            raise JobError(f"{origin}: holds no tensor for {key} of {name}; {way_out}")
        if value.is_floating_point() != tensor.is_floating_point() or not value.isfinite().all():
            raise JobError(
                f"{origin}: {key} holds numbers that are no weights ({value.dtype}, or not finite); {way_out}"
            )
        if value.shape != tensor.shape:
            raise JobError(
                f"{origin}: {key} has shape {list(value.shape)}, {name} needs {list(tensor.shape)}; {way_out}"
            )
    return {key: found[key] for key in wanted}
