"""Many photos at once for one model: decoded on a few threads, described and ranked in batches on one."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.answer_photos import AnsweredPhoto, Request, name_places
from evaluation.localiser import Localiser
from evaluation.places import KnownPosition, known_position
from evaluation.uploads import Limits, Refused, check_photo, unreadable
from shards.upright import UnreadablePhoto
from training.queries import QueryBatch, decode_query
from training.scoring import describe_batches


@dataclass(frozen=True)
class Upload:
    """A decoded photo, uint8 [H, W, 3] RGB, its name, and where it says that it was taken."""

    name: str
    image: np.ndarray
    known: KnownPosition | None


@dataclass(frozen=True)
class Located:
    """An answer with the descriptor float32 [D] that it comes from."""

    photo: AnsweredPhoto
    vector: Tensor


class AnswerQueue:
    """Answers at most `most` photos at a time; a further one is refused, so that memory stays bounded.

    Decoding takes up to eight bytes a pixel on each of `request.threads` threads.
    """

    def __init__(self, localiser: Localiser, request: Request, limits: Limits, most: int) -> None:
        self.localiser = localiser
        self.request = request
        self.limits = limits
        self.most = most
        self.under_way = 0
        self.decoders = ThreadPoolExecutor(request.threads, "decode")
        self._model = ThreadPoolExecutor(1, "model")
        self._waiting: deque[tuple[Upload, Future[Located]]] = deque()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue for as long as the block runs; called from one thread, that of the event loop."""
        if self.under_way >= self.most:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self.most} photos are being answered just now; try again in a moment.",
            )
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def decode(self, content: bytes, name: str) -> Upload:
        """A photo from the bytes of its file; raises Refused for one that is too large or cannot be read."""
        check_photo(content, self.limits)
        try:
            image = decode_query(io.BytesIO(content), self.localiser.shorter_side)
        except UnreadablePhoto as error:
            raise unreadable(error, self.limits) from error
        classes = self.localiser.classes
        known = known_position(Path(name), classes.zone, southern=classes.southern, content=io.BytesIO(content))
        return Upload(name, image, known)

    def answer(self, upload: Upload) -> Future[Located]:
        """The places of a photo, found together with those of the photos that wait beside it."""
        future: Future[Located] = Future()
        self._waiting.append((upload, future))
        self._model.submit(self._answer_waiting)
        return future

    def describe(self, images: Sequence[np.ndarray]) -> Future[Tensor]:
        """Descriptors float32 [B, D] of decoded photos uint8 [H, W, 3]."""
        return self._model.submit(self._describe, images)

    def close(self) -> None:
        """Let go of what waits; what is under way is finished."""
        for pool in (self.decoders, self._model):
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer_waiting(self) -> None:
        """Answer the photos that wait. Each photo schedules one call, which may find it answered beside another."""
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.request.batch_size))]
        batch = [(upload, future) for upload, future in batch if future.set_running_or_notify_cancel()]
        if not batch:
            return
        uploads = [upload for upload, _ in batch]
        try:
            vectors = self._describe([upload.image for upload in uploads])
            paths, known = [Path(upload.name) for upload in uploads], [upload.known for upload in uploads]
            answered = name_places(self.localiser, vectors, paths, known, self.request)
        except Exception as error:  # whoever waits for a photo of the batch is told
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), photo, vector in zip(batch, answered, vectors, strict=True):
            future.set_result(Located(photo, vector))

    def _describe(self, images: Sequence[np.ndarray]) -> Tensor:
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            shapes.setdefault(image.shape, []).append(i)
        batches = []
        for (height, width, _), same in shapes.items():
            most = max(1, self.request.batch_size * 3 * self.localiser.shorter_side**2 // (2 * height * width))
            for first in range(0, len(same), most):
                some = same[first : first + most]
                batches.append(QueryBatch(np.array(some), np.stack([images[i] for i in some])))
        model, device = self.localiser.model, self.localiser.device
        return describe_batches(model, batches, len(images), device=device).vectors
