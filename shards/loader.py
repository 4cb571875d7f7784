"""The input path: batches of a data set in the order that (seed, step, slot) decides.

Three parts, each replaceable without the others: `shards.sampler` (slots to samples and crop boxes),
`shards.reader` (bytes of a sample), and a decoder (bytes and boxes to uint8 images on the device).
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Literal, Protocol

import numpy as np
import torch

from shards.batch import Batch, BatchPlan, Supply
from shards.console import JobError
from shards.dataset import Dataset
from shards.decode_cpu import CpuDecoder
from shards.decode_dali import HARDWARE_SHARE, DaliDecoder
from shards.index import open_index
from shards.sampler import IndexedSampler, Schedule, slots_of_rank
from shards.stream import Stream, StreamSettings
from shards.workers import cores_of_process

Mode = Literal["indexed", "stream"]
DecoderName = Literal["auto", "cpu", "dali"]
_AHEAD = 3  # batches under way beside the one that is waited for; DALI takes an empty queue for the end


class Decoder(Protocol):
    """Turns plans into images, in the order of submission; several plans may be under way, or yet to be drawn."""

    def submit(self, plan: Future[BatchPlan]) -> None: ...
    def take(self) -> torch.Tensor: ...
    def close(self) -> None: ...


class Loader:
    """Reads, decodes and augments the photos that training asks for, ahead of it.

    `schedule(step)` gives the group of every slot of the global batch, int [batch_size]; rank r of R owns the
    slots r, r + R, r + 2R, ... What a slot holds depends on seed, step and slot alone, so any number of threads
    and ranks trains on the same global batch, and a resumed run goes on with the same draws.

    `mode`: "indexed" draws and reads single photos (SSD, page cache); "stream" reads runs of neighbours
    (hard disk, network), see `shards.stream`. `hardware_share` is that of `shards.decode_dali`.
    """

    def __init__(
        self,
        dataset: Dataset,
        schedule: Schedule,
        *,
        batch_size: int,
        image_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mode: Mode = "indexed",
        stream: StreamSettings | None = None,
        decoder: DecoderName = "auto",
        threads: int | None = None,
        hardware_share: float = HARDWARE_SHARE,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < world_size:
            raise JobError(f"--batch-size {batch_size} is less than the number of processes ({world_size})")
        index = open_index(dataset.path, dataset.classes)
        empty = [g for g, of_group in index.items() if not len(of_group.labels)]
        if empty:
            raise JobError(
                f"{dataset.place}: group {empty[0]} has no photos: they were all set aside (quarantine.jsonl); fetch "
                "them anew and run preprocessing/build_shards.py --retry-quarantined, or build another data set "
                "with a smaller --N"
            )
        self._slots = slots_of_rank(batch_size, rank, world_size)
        reader, photo_size = dataset.reader(index), dataset.manifest.image_size
        if mode == "stream":
            settings = stream or StreamSettings()
            both = Stream(index, reader, schedule, self._slots, batch_size, seed, settings)
            self._supply = Supply(both, both, photo_size)
        else:
            self._supply = Supply(IndexedSampler(index, seed), reader, photo_size)
        self._schedule = schedule
        self._device = torch.device(device)
        self._image_size = image_size
        self._threads, self._hardware_share = threads or cores_of_process(), hardware_share
        self.decoder_name = choose_decoder(decoder, self._device)

    @property
    def failures(self) -> int:
        """How many photos could not be read or decoded and were replaced by the next draw of their slot."""
        return self._supply.failed

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's share of the steps from `first_step` up to, not including, `last_step`."""
        plans: deque[Future[BatchPlan]] = deque()
        decoder = self._make_decoder()
        # Drawing is not the trainer's: of a step of 10 ms it would be the twentieth part.
        planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        try:
            ahead = first_step
            for step in range(first_step, last_step):
                start = time.perf_counter()
                while ahead < min(step + 1 + _AHEAD, last_step):
                    plans.append(planner.submit(self._plan, ahead))
                    decoder.submit(plans[-1])
                    ahead += 1
                images = decoder.take()
                waited = time.perf_counter() - start
                plan = plans.popleft().result()
                yield Batch(step, images, torch.from_numpy(plan.labels), plan.groups, waited)
        finally:
            planner.shutdown(wait=False, cancel_futures=True)
            decoder.close()

    def blank(self, step: int) -> Batch:
        """A batch of zeros of this rank's share: for a step that all ranks must enter but whose result is discarded."""
        count, size = len(self._slots), self._image_size
        images, labels = torch.zeros((count, size, size, 3), dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
        return Batch(step, images, labels, np.asarray(self._schedule(step))[self._slots], 0.0)

    def close(self) -> None:
        """Close the shards."""
        self._supply.reader.close()

    def _plan(self, step: int) -> BatchPlan:
        return BatchPlan(self._supply, step, self._slots, np.asarray(self._schedule(step))[self._slots])

    def _make_decoder(self) -> Decoder:
        supply, count, size, threads = self._supply, len(self._slots), self._image_size, self._threads
        if self.decoder_name == "dali":
            return DaliDecoder(supply, count, size, threads, self._device, self._hardware_share)
        return CpuDecoder(supply, count, size, threads, pin=self._device.type == "cuda")


def choose_decoder(name: DecoderName, device: torch.device) -> Literal["cpu", "dali"]:
    """The decoder that `auto` stands for: DALI on a GPU where it is installed, else CPU threads."""
    if name != "auto":
        return name
    return "dali" if device.type == "cuda" and _has_dali() else "cpu"


def _has_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
