"""Photos of a cell out of the shards, to show beside an answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shards.dataset import Dataset
from shards.layout import shard_tables


class SamplePhotos:
    """A training photo of any cell of a data set, seen in about the direction of the query; none without a data set."""

    def __init__(self, dataset: Dataset | None) -> None:
        self.dataset = dataset
        self.tables: dict[int, list[Path]] = {}
        if dataset is None:
            return
        classes = dataset.classes
        cells = zip(classes.cell_east.tolist(), classes.cell_north.tolist(), strict=True)
        self.rows = {cell: row for row, cell in enumerate(cells)}
        for table in shard_tables(dataset.path):
            self.tables.setdefault(int(table.parent.name.rsplit("-", 1)[1]), []).append(table)

    @classmethod
    def open(cls, path: Path | None) -> SamplePhotos:
        """The photos of the data set at `path`, None for no photos; raises JobError where it is no data set."""
        return cls(None if path is None else Dataset.open(path))

    def of_cell(self, cell: tuple[int, int], M: int, heading: float | None = None) -> bytes | None:
        """A JPEG of the cell with this lower-left corner (metres) and side `M`; None where there is none.

        Of the cell's photos in one shard, the one whose heading (degrees) is next to `heading`. Raises OSError
        where a shard cannot be read.
        """
        if self.dataset is None or self.dataset.classes.M != M or cell not in self.rows:
            return None
        classes, row = self.dataset.classes, self.rows[cell]
        label = int(classes.label[row])
        for path in self.tables.get(int(classes.group[row]), []):
            columns = ["heading", "offset", "size"]
            photos = pq.read_table(path, columns=columns, filters=[("label", "==", label)])
            if len(photos) == 0:
                continue
            headings = photos["heading"].to_numpy().astype(np.float64)
            turn = np.abs((headings - (heading or 0.0) + 180) % 360 - 180)
            best = int(np.argmin(np.where(np.isfinite(turn), turn, 360)))
            with path.with_suffix(".tar").open("rb") as tar:
                tar.seek(photos["offset"][best].as_py())
                return tar.read(photos["size"][best].as_py())
        return None
