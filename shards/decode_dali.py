"""Decodes batches with NVIDIA DALI: on a GPU `mixed` JPEG decoding and the rest on the GPU, or its CPU backend.

Draws come from outside: DALI gets bytes and boxes through external sources and only carries them out, so both
decoders train on the same samples. The import is here and nowhere else, since DALI is an optional extra.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import simplejpeg
import torch

from shards.batch import BatchPlan, Supply
from shards.console import JobError
from shards.decode_cpu import CpuDecoder, check_size

HARDWARE_SHARE = 0.65  # DALI's own default
_DEPTH = 2
_END_OF_IMAGE = b"\xff\xd9"
_Read = tuple[Any, np.ndarray, np.ndarray]  # JPEGs, and int32 [b, 2] each: top and left, height and width of the crops
_Reading = tuple[Future[BatchPlan], Future[_Read]]


class DaliDecoder:
    """Submit plans of `count` samples, take their images in the same order; see `shards.loader`.

    `device`: a CUDA device for decoding there, a CPU device for DALI's CPU backend; `hardware_share` of the photos
    go to the GPU's JPEG engine where it has one, the rest to its other cores and `threads`. A batch that DALI
    refuses (a damaged photo) is decoded by the CPU decoder, which replaces the photo; DALI then starts afresh.
    """

    def __init__(
        self,
        supply: Supply,
        count: int,
        image_size: int,
        threads: int,
        device: torch.device,
        hardware_share: float = HARDWARE_SHARE,
    ) -> None:
        _check_dali()
        self._supply, self._count, self._size = supply, count, image_size
        self._threads, self._device = threads, device
        self._hardware_share = hardware_share
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._waiting: deque[_Reading] = deque()
        self._running: deque[_Reading] = deque()
        self._pipeline: Any = None
        self._copied: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def submit(self, plan: Future[BatchPlan]) -> None:
        """Start reading a plan's photos as soon as it is drawn."""
        self._waiting.append((plan, self._readers.submit(self._read, plan)))

    def take(self) -> torch.Tensor:
        """Images of the oldest submitted plan, uint8 [b, S, S, 3] on the decoder's device."""
        begins = self._pipeline is None
        if begins:
            self._pipeline = self._build()
        try:
            if begins:
                self._pipeline.schedule_run()
            (images,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            return self._recover(error)
        if self._device.type == "cuda":
            out = self._copy_on_device(torch.from_dlpack(images.as_tensor()))
        else:
            out = torch.from_numpy(images.as_array().copy())
        self._pipeline.release_outputs()
        self._running.popleft()
        self._supply.count(self._count)
        self._pipeline.schedule_run()
        return out

    def _copy_on_device(self, images: torch.Tensor) -> torch.Tensor:
        """A copy in torch's own memory, queued behind the trainer's work without waiting for it.

        DALI reuses its memory once no tensor refers to it, whatever is still queued; so `images` is held until its
        copy is done, at the latest when the next batch is taken.
        """
        self._finish_copy()
        with torch.cuda.device(self._device):
            copy = images.clone()
            done = torch.cuda.Event()
            done.record()
        self._copied = (images, done)
        return copy

    def _finish_copy(self) -> None:
        if self._copied is not None:
            self._copied[1].synchronize()
        self._copied = None

    def close(self) -> None:
        """Stop reading, as `CpuDecoder.close` does, and free the pipeline."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._waiting.clear()
        self._running.clear()
        self._finish_copy()
        self._pipeline = None

    def _read(self, drawn: Future[BatchPlan]) -> _Read:
        plan = drawn.result()
        photos = [plan.use(i, self._check) for i in range(len(plan))]
        left, top, width, height = plan.boxes.astype(np.int32).T  # now: reading may have replaced some
        return _as_tensor_list(photos), np.stack([top, left], axis=1), np.stack([height, width], axis=1)

    def _check(self, jpeg: bytes) -> np.ndarray:
        """The bytes of a photo that DALI can be given, uint8 [n]; raises `ValueError`."""
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)  # DALI would cut a larger one's corner
        check_size(height, width, self._supply.photo_size)
        if not jpeg.endswith(_END_OF_IMAGE):
            simplejpeg.decode_jpeg(jpeg)  # DALI would make up the rest of a truncated photo
        return np.frombuffer(jpeg, np.uint8)

    def _feed(self) -> _Read:
        """DALI's source: the next plan's photos and crops; the end where none was submitted."""
        if not self._waiting:
            raise StopIteration
        self._running.append(self._waiting.popleft())
        return self._running[-1][1].result()

    def _recover(self, error: RuntimeError) -> torch.Tensor:
        """Decode the oldest batch on the CPU after DALI failed on it, and run those after it again."""
        plan, _ = self._running.popleft()
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()
        self._pipeline = None
        failed = self._supply.failed
        cpu = CpuDecoder(self._supply, self._count, self._size, self._threads, pin=False)
        cpu.submit(plan)
        images = cpu.take()
        cpu.close()
        if self._supply.failed == failed:
            step = plan.result().step
            raise JobError(f"step {step}: DALI failed on photos that are sound: {_one_line(error)}") from error
        return images.to(self._device)

    def _build(self):  # type: ignore[no-untyped-def]  # DALI has no type hints
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self._device.type == "cuda"
        side = self._supply.photo_size
        hardware: dict[str, Any] = {}
        if on_gpu:
            hardware = {"hw_decoder_load": self._hardware_share}
            hardware |= {"preallocate_width_hint": side, "preallocate_height_hint": side}

        @pipeline_def(
            batch_size=self._count,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_DEPTH,
            exec_dynamic=True,  # outputs stay valid as long as something refers to them
        )
        def graph():  # type: ignore[no-untyped-def]
            jpegs, anchor, shape = fn.external_source(
                self._feed, num_outputs=3, dtype=[types.UINT8, types.INT32, types.INT32], ndim=1
            )
            photos = fn.decoders.image_slice(
                jpegs,
                anchor,
                shape,
                axes=(0, 1),
                normalized_anchor=False,
                normalized_shape=False,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                **hardware,
            )
            return fn.resize(photos, size=(self._size, self._size), interp_type=types.INTERP_LINEAR, antialias=True)

        pipeline = graph()
        try:
            pipeline.build()
        except RuntimeError as error:
            raise JobError(f"DALI cannot begin ({_one_line(error)}); --decoder cpu does without it") from error
        return pipeline


def _check_dali() -> None:
    """Raise `JobError` where DALI is not there or too old."""
    needs = "--decoder dali needs NVIDIA DALI"
    way_out = "pip install 'divide-and-classify[dali-cuda13]' (or dali-cuda12), or use --decoder cpu"
    try:
        import nvidia.dali
    except ImportError:
        raise JobError(f"{needs}: {way_out}") from None
    version = nvidia.dali.__version__
    if int(version.split(".")[0]) < 2:  # which cannot take photos without a copy
        raise JobError(f"{needs} 2.0 or later, not {version}: {way_out}")


def _as_tensor_list(photos: list[np.ndarray]) -> Any:
    """Photos (uint8 [bytes] each) as DALI takes them, without a copy. Left to DALI, this is done one by one in the
    thread that asks for a batch, which is the trainer's."""
    from nvidia.dali.tensors import TensorCPU, TensorListCPU

    tensors = [TensorCPU(photo) for photo in photos]
    return TensorListCPU(tensors, contiguous=False)  # type: ignore[call-overload]  # its stub is incomplete


def _one_line(error: RuntimeError) -> str:
    """What DALI says, without its stack trace."""
    return " ".join(str(error).split("Stack trace")[0].split())
