"""What people use to read photos for training: the reference's way, webdataset and LitData with torchvision,
webdataset with faster libraries, and DALI's own reader."""

import math
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from shards.layout import shard_tables

BATCH, SIZE = 64, 224
AREA, RATIO = (0.66, 1.0), (3 / 4, 4 / 3)
AUGMENTATION = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.Resize((SIZE, SIZE), antialias=True),
        transforms.RandomResizedCrop(SIZE, scale=AREA, ratio=RATIO, antialias=True),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
OF_TENSOR = transforms.Compose([transforms.ConvertImageDtype(torch.float32), *AUGMENTATION.transforms[1:]])


class Files(Dataset[tuple[torch.Tensor, int]]):
    """The reference's data set: a class uniformly, then a photo uniformly within it, decoded by PIL."""

    def __init__(self, classes: list[list[Path]]) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, _: int) -> tuple[torch.Tensor, int]:
        label = int(torch.randint(len(self.classes), ()))
        photos = self.classes[label]
        with Image.open(photos[int(torch.randint(len(photos), ()))]) as image:
            return AUGMENTATION(image.convert("RGB")), label


def reference_files(folder: Path, cores: int) -> Iterator[int]:
    classes = [sorted(c.iterdir()) for c in sorted(folder.iterdir())]
    workers = 0 if cores == 1 else cores
    for images, _ in DataLoader(Files(classes), BATCH, num_workers=workers):
        yield len(images)


def webdataset_torchvision(shards: Path, cores: int) -> Iterator[int]:
    samples = _webdataset(shards).decode("pil").to_tuple("jpg", "cls").map_tuple(AUGMENTATION, int)
    workers = 0 if cores == 1 else cores
    for images, _ in DataLoader(samples, BATCH, num_workers=workers):
        yield len(images)


def webdataset_simplejpeg(shards: Path, cores: int) -> Iterator[int]:
    """uint8 batches made within the workers, as webdataset recommends, by the libraries of this project's decoder."""
    cv2.setNumThreads(1)
    samples = _webdataset(shards).to_tuple("jpg", "cls").map_tuple(_random_crop, int).batched(BATCH)
    workers = 0 if cores == 1 else cores
    for images, _ in DataLoader(samples, None, num_workers=workers):
        yield len(images)


def _webdataset(shards: Path) -> Any:
    import webdataset

    tars = [str(t.with_suffix(".tar")) for t in shard_tables(shards)]
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars), nodesplitter=webdataset.split_by_node)
    return samples.repeat().shuffle(1000)


def _random_crop(jpeg: bytes) -> np.ndarray:
    photo = simplejpeg.decode_jpeg(jpeg)
    height, width, _ = photo.shape
    while True:
        area = height * width * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            break
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    return cv2.resize(photo[top : top + h, left : left + w], (SIZE, SIZE))


def dali_webdataset(shards: Path, cores: int) -> Iterator[int]:
    """DALI's own reader, decoder and crop on its CPU back end, uint8."""
    from nvidia.dali import fn, pipeline_def, types

    tables = shard_tables(shards)

    @pipeline_def(batch_size=BATCH, num_threads=cores, device_id=None, exec_dynamic=True)
    def graph():  # type: ignore[no-untyped-def]  # DALI has no type hints
        jpegs, labels = fn.readers.webdataset(  # type: ignore[misc]  # its stub allows for no output
            paths=[str(t.with_suffix(".tar")) for t in tables],
            index_paths=[str(t.with_suffix(".idx")) for t in tables],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=1000,
        )
        photos = fn.decoders.image_random_crop(jpegs, random_area=AREA, random_aspect_ratio=RATIO)
        return fn.resize(photos, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR), labels

    pipeline = graph()
    while True:
        photos, texts = pipeline.run()
        images = torch.from_dlpack(photos.as_tensor())
        torch.tensor([int(bytes(texts.at(i))) for i in range(BATCH)])  # the labels
        yield len(images)


def litdata_stream(folder: Path, cores: int) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    photos = StreamingDataset(str(folder), shuffle=True, transform=_litdata_crop)
    while True:
        for images, _ in StreamingDataLoader(photos, batch_size=BATCH, num_workers=0 if cores == 1 else cores):
            yield len(images)


def _litdata_crop(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    return OF_TENSOR(sample["image"]), sample["label"]  # LitData has decoded it


def write_files(shards: Path, folder: Path, copies: int = 1) -> None:
    """The photos of the shards as files, each `copies` times, a folder for each class, as the reference reads them."""
    for table in shard_tables(shards):
        with tarfile.open(table.with_suffix(".tar")) as tar:
            held = b""
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                if member.name.endswith(".jpg"):
                    held = data.read()
                else:
                    place = folder / f"{table.parent.name}-{data.read().decode()}"
                    place.mkdir(parents=True, exist_ok=True)
                    for copy in range(copies):
                        (place / member.name.replace(".cls", f"-{copy}.jpg")).write_bytes(held)


def write_litdata(files: Path, folder: Path) -> bool:
    try:
        from litdata import optimize
    except ImportError:
        return False
    photos = [(str(p), i) for i, c in enumerate(sorted(files.iterdir())) for p in sorted(c.iterdir())]
    optimize(_litdata_sample, photos, str(folder), chunk_bytes="64MB", num_workers=1)
    return True


def _litdata_sample(photo: tuple[str, int]) -> dict[str, object]:
    from PIL.JpegImagePlugin import JpegImageFile

    return {"image": JpegImageFile(photo[0]), "label": photo[1]}
