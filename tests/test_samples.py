"""Samples are made in batches of photos."""

import numpy as np
from photos import jpeg

from preprocessing.resize import BadPhoto, Resizer
from preprocessing.samples import SampleMaker
from preprocessing.sources import Source


class Noting(Resizer):
    """Notes how many photos it is given at a time."""

    def make(self, photos):
        taken.append(len(photos))
        return super().make(photos)


taken: list[int] = []


def test_batches_are_full_unless_photos_are_large(tmp_path, monkeypatch):
    names = [f"{i:02}.jpg" for i in range(2 * Resizer.batch + 3)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(jpeg(64, i))
    names.insert(5, "gone.jpg")
    alone = [Resizer(32, 90)((tmp_path / name).read_bytes()) for name in names if name != "gone.jpg"]

    def made() -> list[bytes | BadPhoto]:
        taken.clear()
        source = Source.of(tmp_path)
        return [small for small, _ in SampleMaker([source], Noting(32, 90), names).make()]

    found = made()
    assert isinstance(found.pop(5), BadPhoto)
    assert found == alone
    assert taken == [Resizer.batch - 1, Resizer.batch, 4]
    monkeypatch.setattr("preprocessing.samples._MOST_BYTES", 3 * len(jpeg(64, 0)))
    found = made()
    assert isinstance(found.pop(5), BadPhoto)
    assert found == alone
    assert np.max(taken) <= 5 < np.sum(taken)
