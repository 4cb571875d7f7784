"""Which libraries make the small JPEGs: those of the CPU, or an NVIDIA GPU's."""

from typing import Literal

from preprocessing.gpu_resize import GpuResizer, gpu_codec_name
from preprocessing.resize import ResizeFilter, Resizer, cpu_codec_name
from shards.dataset import GPU_CODEC

Codec = Literal["cpu", "gpu"]


def make_resizer(codec: Codec, size: int, quality: int, resize_filter: ResizeFilter) -> Resizer:
    """A resizer of a codec; raises `JobError` where the GPU or its libraries are not there."""
    if codec == "cpu":
        return Resizer(size, quality, resize_filter)
    resizer = GpuResizer(size, quality, resize_filter)
    resizer.check()
    return resizer


def codec_name(codec: Codec) -> str:
    """The libraries that decide the bytes of a JPEG, with versions. Raises `JobError` where they are not there."""
    return cpu_codec_name() if codec == "cpu" else f"{GPU_CODEC}{gpu_codec_name()}, {cpu_codec_name()}"
