"""Resizes on an NVIDIA GPU: nvImageCodec decodes and encodes, torch reduces, a batch of photos at a time.

Only plain, whole JPEGs go to the GPU. Everything else, and whatever it cannot decode, goes to the CPU codec, so that
a bad photo is refused with the same reason. nvJPEG conceals damage inside a whole file that libjpeg-turbo may notice.
"""

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import simplejpeg

from preprocessing.resize import BadPhoto, Resizer, is_whole
from shards.console import JobError, first_line

_REMEDY = "pip install 'divide-and-classify[gpu-codec]'"
_MOST_PIXELS = 1 << 25  # of a photo on the GPU, and of all that are decoded there at a time: 0.1 GB, and 1 GB to reduce
_CPU_DEVICE = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY, a name that Python has from nvImageCodec 0.9 on
_MOST_REDUCED = 40  # times, of either side: torch's filter fails beyond 47, where its weights fill a block's 48 kB


@dataclass(frozen=True)
class GpuResizer(Resizer):
    """A `Resizer` on a GPU that other processes may share; it reduces by torch's anti-aliased bicubic filter.

    `device`: as torch names it ("cpu" runs the same steps on nvImageCodec's CPU back end). The libraries are loaded
    when the first photos come; `JobError` says what is missing.
    """

    device: str = "cuda"
    batch: ClassVar[int] = 64

    def check(self) -> None:
        """Raise `JobError` where the libraries or the GPU are not there, or cannot make a JPEG."""
        grey = simplejpeg.encode_jpeg(np.full((64, 64, 3), 128, np.uint8))
        if self._small([grey], 32) == [None]:
            raise JobError(f"--codec gpu: nvImageCodec makes no JPEG here, as without nvJPEG: {_REMEDY}")

    def make(self, photos: Sequence[bytes]) -> list[bytes | BadPhoto]:
        """The small JPEG of each of `photos`, or why there is none."""
        made: list[bytes | BadPhoto | None] = [None] * len(photos)
        waiting: list[int] = []
        pixels = 0
        for i, data in enumerate(photos):
            photo_pixels = self._plain_pixels(data)
            if not photo_pixels:
                continue
            if pixels + photo_pixels > _MOST_PIXELS:
                self._make_some(photos, waiting, made)
                waiting, pixels = [], 0
            waiting.append(i)
            pixels += photo_pixels
        self._make_some(photos, waiting, made)
        return [self._attempt(data) if jpeg is None else jpeg for data, jpeg in zip(photos, made, strict=True)]

    def _plain_pixels(self, data: bytes) -> int:
        """The pixels of a JPEG that the GPU may take; 0 of what the CPU codec should look at."""
        if data[:3] != b"\xff\xd8\xff" or not is_whole(data):
            return 0
        try:
            header = self.jpeg_header(data)
        except BadPhoto:
            return 0
        pixels = header.height * header.width
        plain = header.colorspace in ("YCbCr", "Gray") and header.scalable
        fits = pixels <= _MOST_PIXELS and max(header.height, header.width) <= _MOST_REDUCED * self.size
        return pixels if plain and fits else 0

    def _make_some(self, photos: Sequence[bytes], chosen: list[int], made: list[bytes | BadPhoto | None]) -> None:
        """Fill `made` for the `chosen` of `photos`; None stays where the GPU cannot decode one."""
        if not chosen:
            return
        for i, jpeg in zip(chosen, self._small([photos[i] for i in chosen], self.size), strict=True):
            made[i] = jpeg

    def _small(self, photos: list[bytes], size: int) -> list[bytes | None]:
        try:
            return _machines(self.device).small(photos, size, self.quality)
        except RuntimeError as error:  # of torch or nvImageCodec, which names a full memory by its CUDA number only
            raise JobError(
                f"the GPU failed ({first_line(error)}); where its memory is full, fewer --workers need less (the same "
                "command goes on)"
            ) from error


class _Machines:
    """A process's decoder and encoder on one device."""

    def __init__(self, codec: Any, torch: Any, device: str) -> None:
        self._codec, self._torch = codec, torch
        self._cuda = device != "cpu"
        # On a GPU its own decoders only: nvImageCodec's for the CPU would take over in silence, and ours is at hand.
        gpu = (codec.HW_GPU_ONLY, codec.HYBRID_CPU_GPU, codec.GPU_ONLY)
        place = {
            "device_id": 0 if self._cuda else _CPU_DEVICE,
            "backends": [codec.Backend(kind) for kind in (gpu if self._cuda else (codec.CPU_ONLY,))],
            "max_num_cpu_threads": 1,
        }
        self._decoder, self._encoder = codec.Decoder(**place), codec.Encoder(**place)

    def small(self, photos: list[bytes], size: int, quality: int) -> list[bytes | None]:
        """The small JPEG of each of `photos`, None where it cannot be decoded."""
        codec, torch = self._codec, self._torch
        stream = torch.cuda.current_stream().cuda_stream if self._cuda else 0
        streams = [self._stream(data) for data in photos]
        rgb = codec.DecodeParams(color_spec=codec.ColorSpec.SRGB)
        decoded = iter(self._decoder.decode([s for s in streams if s is not None], params=rgb, cuda_stream=stream))
        images = [None if s is None else next(decoded) for s in streams]
        reduced = [self._reduce(image, size) for image in images if image is not None]
        params = codec.EncodeParams(
            quality_type=codec.QualityType.QUALITY,
            quality_value=quality,
            chroma_subsampling=codec.ChromaSubsampling.CSS_420,
        )
        encoded = self._encoder.encode(
            codec.as_images(reduced, cuda_stream=stream), "jpeg", params=params, cuda_stream=stream
        )
        small = iter(encoded)
        return [None if image is None or (jpeg := next(small)) is None else bytes(jpeg) for image in images]

    def _stream(self, data: bytes) -> Any:
        try:
            return self._codec.CodeStream(data)
        except RuntimeError:
            return None  # it does not take this for an image

    def _reduce(self, image: Any, size: int) -> Any:
        """uint8 [h, w, 3] on the device to an array of uint8 [size, size, 3] that the encoder takes."""
        torch = self._torch
        pixels = torch.from_dlpack(image) if self._cuda else torch.from_numpy(np.asarray(image))
        pixels = pixels.permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        small = small.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous()
        return small if self._cuda else small.numpy()


def _libraries() -> tuple[Any, Any]:
    try:
        return importlib.import_module("nvidia.nvimgcodec"), importlib.import_module("torch")
    except ImportError as error:
        raise JobError(f"--codec gpu needs nvImageCodec ({error}): {_REMEDY}") from None


@functools.cache
def _machines(device: str) -> _Machines:
    codec, torch = _libraries()
    if device != "cpu" and not torch.cuda.is_available():
        raise JobError("--codec gpu needs an NVIDIA GPU, and torch sees none; leave it out to resize on the CPU")
    return _Machines(codec, torch, device)


def gpu_codec_name() -> str:
    """The libraries that decide the bytes of a JPEG made on a GPU, with versions; the CPU codec's take the rest."""
    codec, torch = _libraries()
    return f"nvImageCodec {codec.__version__}, torch {torch.__version__}"
