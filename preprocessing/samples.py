"""Makes the small JPEGs of a shard's samples: of photos as they are, or of crops cut out of panoramas."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from preprocessing.resize import BadPhoto, Resizer
from preprocessing.sources import Source, split_sample

_MOST_BYTES = 1 << 26


class SampleMaker:
    """Makes `samples`, those of one shard. A panorama is read and decoded once for all of its crops among them: these
    wait as small JPEGs, at most one shard's worth. `on_read` gets the bytes of every photo."""

    def __init__(
        self,
        sources: Sequence[Source],
        resizer: Resizer,
        samples: Sequence[str],
        on_read: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        self._on_read = on_read
        self._sources = sources
        self._resizer = resizer
        self._samples = samples
        self._waiting: dict[str, bytes | BadPhoto] = {}
        self._crops: dict[str, list[str]] = defaultdict(list)
        if any(source.crops for source in sources):
            for sample in samples:
                if self.turn(sample) is not None:
                    self._crops[sample.rpartition("#")[0]].append(sample)

    def turn(self, sample: str) -> float | None:
        """By how many degrees a crop is turned from its panorama's middle; None of a whole photo."""
        number, rest = split_sample(sample)
        return float(rest.rpartition("#")[2]) if self._sources[number].crops else None

    def photo(self, sample: str) -> str:
        """The path of a sample's photo below its source's root."""
        number, rest = split_sample(sample)
        return rest.rpartition("#")[0] if self._sources[number].crops else rest

    def make(self) -> Iterator[tuple[bytes | BadPhoto, int]]:
        """For each of the samples, in order, its small JPEG or why there is none, and how many bytes were read for it.

        Photos are read and resized as many at a time as the resizer takes. Raises `JobError`.
        """
        for part in self._parts():
            crops = [self.turn(sample) is not None for sample, _ in part]
            whole = [d for (_, d), crop in zip(part, crops, strict=True) if not crop and not isinstance(d, BadPhoto)]
            small = iter(self._resizer.make(whole))
            for (sample, data), crop in zip(part, crops, strict=True):
                if isinstance(data, BadPhoto):
                    yield data, 0
                else:
                    yield self._crop(sample, data) if crop else next(small), len(data)

    def _parts(self) -> Iterator[list[tuple[str, bytes | BadPhoto]]]:
        """Samples with the bytes of their photos: a batch of the resizer's, or fewer where photos are large; one by one
        where there are panoramas, whose first crop reads for all."""
        most = 1 if self._crops else self._resizer.batch
        part: list[tuple[str, bytes | BadPhoto]] = []
        held = 0
        for sample in self._samples:
            data = self._read(sample)
            part.append((sample, data))
            held += 0 if isinstance(data, BadPhoto) else len(data)
            if len(part) == most or held >= _MOST_BYTES:
                yield part
                part, held = [], 0
        if part:
            yield part

    def _read(self, sample: str) -> bytes | BadPhoto:
        """The bytes of a sample's photo; none where they were read before."""
        if sample in self._waiting:
            return b""
        try:
            data = self._sources[split_sample(sample)[0]].read(self.photo(sample))
        except BadPhoto as bad:
            for other in self._crops.get(sample.rpartition("#")[0], ()):
                self._waiting[other] = bad
            return bad
        self._on_read(data)
        return data

    def _crop(self, sample: str, data: bytes) -> bytes | BadPhoto:
        if sample not in self._waiting:
            self._cut(self._crops[sample.rpartition("#")[0]], data)
        return self._waiting.pop(sample)

    def _cut(self, samples: list[str], data: bytes) -> None:
        try:
            strip = self._resizer.decode(data)
            for sample in samples:
                crop = cut_crop(strip, float(sample.rpartition("#")[2]))
                self._waiting[sample] = self._resizer.shrink(crop, data)
        except BadPhoto as bad:
            for sample in samples:
                self._waiting[sample] = bad


def cut_crop(strip: np.ndarray, turn: float) -> np.ndarray:
    """The square crop (uint8 [h, h, c]) of a panorama (uint8 [h, w, c], 360 degrees wide) that is centred `turn`
    degrees to the right of its middle, as SF-XL's are cut: columns of the strip, without reprojection.

    Raises `BadPhoto` where the strip is not at least twice as wide as high.
    """
    height, width = strip.shape[:2]
    if width < 2 * height:
        raise BadPhoto("not a panorama", f"{width / height:.2f} times as wide as high, less than twice")
    left = round(width / 2 + turn * width / 360 - height / 2) % width
    if left + height <= width:
        return np.ascontiguousarray(strip[:, left : left + height])
    return np.concatenate([strip[:, left:], strip[:, : left + height - width]], axis=1)
