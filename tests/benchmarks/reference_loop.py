"""The reference's training loop as `method.md` words it, with nothing made faster: the baseline of `training.py`.

Files read by PIL in a DataLoader, one head and one Adam a group that travel between main memory and the device
every epoch, a one-hot head, fp16 with a scaler on a GPU (on the CPU float32).
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as transforms

from shards.dataset import Dataset as Shards
from shards.index import open_index
from shards.reader import ShardReader

AUGMENTATION = transforms.Compose(
    [
        transforms.ToImage(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Resize((224, 224), antialias=True),
        transforms.RandomResizedCrop(224, scale=(0.66, 1.0), antialias=True),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


class Photos(Dataset[tuple[Tensor, int]]):
    """Photos of one group: a class uniformly, then a photo uniformly within it."""

    def __init__(self, classes: list[list[Path]], length: int) -> None:
        self.classes = classes
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, _: int) -> tuple[Tensor, int]:
        label = int(torch.randint(len(self.classes), ()))
        photos = self.classes[label]
        with Image.open(photos[int(torch.randint(len(photos), ()))]) as image:
            return AUGMENTATION(image.convert("RGB")), label


class ReferenceLoop:
    """EfficientNet-B0 with AAMC heads, trained one group an epoch. `classes` are the photos by group and class."""

    def __init__(
        self, classes: list[list[list[Path]]], *, batch: int, steps: int, workers: int, device: torch.device
    ) -> None:
        self.classes, self.batch, self.steps, self.workers, self.device = classes, batch, steps, workers, device
        features = torchvision.models.efficientnet_b0(weights=None).features
        for child in list(features)[:5]:
            child.requires_grad_(False)
        self.model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1280)).to(device)
        self.heads = [nn.Parameter(nn.init.xavier_uniform_(torch.empty(len(group), 1280))) for group in classes]
        self.adam = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.head_adams = [torch.optim.Adam([head], lr=1e-2) for head in self.heads]
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def epoch(self, number: int) -> float:
        """Train an epoch; images a second, moving the head included, starting the loader's workers too."""
        begin = time.perf_counter()
        group = number % len(self.classes)
        self._move(group, self.device)
        photos = Photos(self.classes[group], self.batch * self.steps)
        pin = self.device.type == "cuda"
        loader = DataLoader(photos, self.batch, num_workers=self.workers, pin_memory=pin)
        total = 0.0
        for images, labels in loader:
            total += self._step(images.to(self.device), labels.to(self.device), group)
        self._move(group, torch.device("cpu"))
        return self.batch * self.steps / (time.perf_counter() - begin)

    def _move(self, group: int, device: torch.device) -> None:
        self.heads[group].data = self.heads[group].data.to(device)
        for state in self.head_adams[group].state.values():
            for name, value in state.items():
                state[name] = value.to(device)

    def _step(self, images: Tensor, labels: Tensor, group: int) -> float:
        self.adam.zero_grad()
        self.head_adams[group].zero_grad()
        with torch.autocast(self.device.type, torch.float16, enabled=self.scaler.is_enabled()):
            descriptors = F.normalize(self.model(images), p=2, dim=1)
            loss = F.cross_entropy(self._logits(descriptors, labels, self.heads[group]), labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.adam)
        self.scaler.step(self.head_adams[group])
        self.scaler.update()
        return loss.item()

    @staticmethod
    def _logits(descriptors: Tensor, labels: Tensor, weight: Tensor, s: float = 100.0, m: float = 0.2) -> Tensor:
        cosine = F.linear(F.normalize(descriptors), F.normalize(weight))
        sine = (1.0 - cosine.square()).clamp(0.0, 1.0).sqrt()
        turned = torch.where(cosine > 0, cosine * math.cos(m) - sine * math.sin(m), cosine)
        one_hot = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1)
        return s * (one_hot * turned + (1 - one_hot) * cosine)


def write_photos(shards: Path, folder: Path) -> list[list[list[Path]]]:
    """The photos of a data set of shards as files, by group and class."""
    dataset = Shards.open(shards)
    index = open_index(dataset.path, dataset.classes)
    reader = ShardReader(index)
    groups = []
    for group, of_group in index.items():
        classes = []
        for label in of_group.labels.tolist():
            place = folder / str(group) / str(label)
            place.mkdir(parents=True)
            rows = range(int(of_group.starts[label]), int(of_group.starts[label + 1]))
            classes.append([place / f"{row}.jpg" for row in rows])
            for row, path in zip(rows, classes[-1], strict=True):
                path.write_bytes(reader.read(group, row))
        groups.append(classes)
    return groups
