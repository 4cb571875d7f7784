"""R@N, time and memory of image retrieval: over all database images, and within the classifier's top cells.

R@N: percent of queries with one of the first N images within the threshold. One query at a time on one thread; the time
of within-cells includes the classifier's ranking.

python evaluation/retrieve.py --checkpoint RUN --database PHOTOS --queries PHOTOS --out DIR [--top-cells 10]
"""

from __future__ import annotations

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from evaluation.gallery import Describer, Gallery, Images, read_descriptors
from evaluation.localiser import Localiser, choose_device, load_localiser
from evaluation.result_files import prepare_folder, write_json
from evaluation.searchers import BestOfCells, CellSearcher, FaissSearcher, Searcher, load_faiss
from shards.console import JobError, check_arguments, entry, format_bytes, format_count, printable
from shards.provenance import provenance
from shards.workers import cores_of_process
from training.scoring import RECALL_NS, THRESHOLD_METRES, recall_at

Method = Literal["exhaustive", "ivf", "hnsw", "best-of-cells", "within-cells"]


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    checkpoint: Path
    """Run (its best checkpoint is taken) or a single checkpoint folder."""
    database: str
    """Folder of photos named by UTM position, a list (.csv, .parquet) with their places, a data set of shards (folder
    or URL), or descriptors (.npz, or .npy beside .txt)."""
    queries: Path
    """Folder of query photos named by UTM position, or a list (.csv, .parquet) with their places."""
    out: Path
    """Folder for retrieval.json and the database's descriptors."""
    query_descriptors: Path | None = None
    """Descriptors of the queries by the model that made those of the database, where that is another one."""
    top_cells: int = 10
    """Cells that within-cells searches; it names an image of each, then one of each cell that follows."""
    methods: tuple[Method, ...] = ("exhaustive", "ivf", "hnsw", "best-of-cells", "within-cells")
    """Ways of searching to compare; best-of-cells is exhaustive and names, as within-cells, one image of each cell."""
    threshold: float = THRESHOLD_METRES
    """Metres within which an image is right."""
    batch_size: int = 32
    """Photos described at once."""
    cpu: bool = False
    """Describe photos on the CPU even where there is a GPU; the searches run on the CPU in any case."""

    def __post_init__(self) -> None:
        check_arguments(
            {
                "--top-cells: at least 1": self.top_cells < 1,
                "--methods: name at least one": not self.methods,
                "--threshold: more than 0 metres, and finite": not 0 < self.threshold < math.inf,
                "--batch-size: at least 1": self.batch_size < 1,
            }
        )


@dataclass(frozen=True)
class Row:
    """What a way of searching gives: R@N in percent, milliseconds a query (mean), bytes of memory, images."""

    name: str
    r_at_1: float
    r_at_5: float
    r_at_10: float
    r_at_20: float
    milliseconds_per_query: float
    bytes: int
    images: int


def main() -> None:
    """Describe, search in every way, and compare."""
    arguments = tyro.cli(Arguments, description=__doc__)
    load_faiss()  # before the database is described, which takes hours where it is large
    prepare_folder(arguments.out)
    localiser = load_localiser(arguments.checkpoint, choose_device(cpu=arguments.cpu))
    describer = Describer(localiser, _warn, arguments.batch_size, cores_of_process())
    queries = describer.photos(localiser.list_queries(arguments.queries))
    vectors = _other_descriptors(arguments.query_descriptors, queries) or queries
    database = describer.database(arguments.database, arguments.out / "database.npz")
    if vectors.vectors.shape[1] != database.vectors.shape[1]:
        raise JobError(
            f"queries have descriptors of {vectors.vectors.shape[1]} numbers and the database of "
            f"{database.vectors.shape[1]}; give --query-descriptors by the same model"
        )
    if (known := count_at_same_places(queries, database)) > len(queries) / 2:
        _warn(
            f"{known:,} of {format_count(len(queries), 'query')} lie at the very place of a database image; where they "
            "are the same photos, R@N tells nothing of new ones"
        )
    gallery = Gallery.of(database, localiser.index)
    del database  # gigabytes, of which the gallery has its own
    if gallery.outside == len(gallery.images) and "within-cells" in arguments.methods:
        raise JobError(
            f"{arguments.database}: none of its {len(gallery.images):,} images lies in a cell of {arguments.checkpoint}"
        )
    rows = compare(localiser, gallery, queries, vectors.vectors, arguments)
    facts = {"settings": {k: str(v) for k, v in asdict(arguments).items()}, "provenance": provenance()}
    write_json(arguments.out / "retrieval.json", [asdict(row) for row in rows], outside=gallery.outside, **facts)
    print(format_rows(rows, len(queries), gallery.outside))


def compare(
    localiser: Localiser, gallery: Gallery, queries: Images, vectors: np.ndarray, arguments: Arguments
) -> list[Row]:
    """One row for every way of searching; `vectors` float32 [Q, D] are the queries' descriptors for retrieval."""
    torch.set_num_threads(1)
    return [
        measure(searcher_of(method, localiser, gallery, arguments), gallery, queries, vectors, arguments.threshold)
        for method in arguments.methods
    ]


def searcher_of(method: Method, localiser: Localiser, gallery: Gallery, arguments: Arguments) -> Searcher:
    """A way of searching, over the images of the gallery."""
    if method == "within-cells":
        form = localiser.product_form
        if form != localiser.form:
            _warn(f"within-cells ranks cells by {form} scores; {localiser.form} ones are no single product")
        return CellSearcher(gallery, *localiser.class_weights(form), arguments.top_cells)
    if method == "best-of-cells":
        return BestOfCells(gallery)
    faiss = load_faiss()
    print(f"{method}: indexing {format_count(len(gallery.images), 'image')}", file=sys.stderr)
    faiss.omp_set_num_threads(cores_of_process())
    searcher = FaissSearcher(gallery, method)
    faiss.omp_set_num_threads(1)
    return searcher


def measure(searcher: Searcher, gallery: Gallery, queries: Images, vectors: np.ndarray, threshold: float) -> Row:
    """Search for every query, one at a time."""
    count = max(RECALL_NS)
    found = []
    searcher.search(vectors[0], queries.vectors[0], count)
    begun = time.perf_counter()
    for vector, classifier_vector in zip(vectors, queries.vectors, strict=True):
        found.append(searcher.search(vector, classifier_vector, count))
    seconds = time.perf_counter() - begun
    recall = recall_at(distances_to(found, gallery, queries, count), RECALL_NS, threshold)
    return Row(
        searcher.name,
        recall[1],
        recall[5],
        recall[10],
        recall[20],
        milliseconds_per_query=1000 * seconds / len(queries),
        bytes=searcher.bytes,
        images=len(gallery.images),
    )


def count_at_same_places(queries: Images, database: Images) -> int:
    """How many queries lie at the place of an image of the database, to the last digit."""
    return int(np.isin(queries.east + 1j * queries.north, database.east + 1j * database.north).sum())


def distances_to(found: Sequence[np.ndarray], gallery: Gallery, queries: Images, count: int) -> np.ndarray:
    """float32 [Q, count]: metres from the queries to the images found for them, infinite where fewer were found."""
    distances = np.full((len(found), count), np.inf, np.float32)
    for i, numbers in enumerate(found):
        east = gallery.images.east[numbers] - queries.east[i]
        distances[i, : len(numbers)] = np.hypot(east, gallery.images.north[numbers] - queries.north[i])
    return distances


def _other_descriptors(path: Path | None, queries: Images) -> Images | None:
    """Another model's descriptors in the order of the queries, matched by path or by file name.

    Raises JobError where a query has none, or several.
    """
    if path is None:
        return None
    others = read_descriptors(path)
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(others.names):
        for key in {name, f"*/{Path(name).name}"}:
            rows.setdefault(key, []).append(i)
    order = []
    for name in queries.names:
        found = rows.get(name) or rows.get(f"*/{Path(name).name}", [])
        if len(found) != 1:
            raise JobError(f"{path}: {len(found)} descriptors for the query {name}; give it one")
        order += found
    return Images(others.vectors[order], queries.east, queries.north, queries.names)


def format_rows(rows: Sequence[Row], queries: int, outside: int) -> str:
    """The comparison as a table for the console."""
    recalls = "  ".join(f"{name:>5}" for name in ("R@1", "R@5", "R@10", "R@20"))
    lines = [f"\n{'search':<13}  {recalls}  {'ms a query':>10}  {'memory':>9}  {'speed':>7}"]
    slowest = next((row.milliseconds_per_query for row in rows if row.name == "exhaustive"), None)
    for row in rows:
        speed = f"{slowest / row.milliseconds_per_query:6.1f}x" if slowest else ""
        lines.append(
            f"{row.name:<13}  {row.r_at_1:5.1f}  {row.r_at_5:5.1f}  {row.r_at_10:5.1f}  {row.r_at_20:5.1f}  "
            f"{row.milliseconds_per_query:10.3f}  {format_bytes(row.bytes):>9}  {speed:>7}"
        )
    images = rows[0].images if rows else 0
    lines.append(
        f"\n{format_count(queries, 'query')} one at a time on one thread, {format_count(images, 'image')} "
        f"({outside:,} of them in no class)"
    )
    return "\n".join(lines)


def _warn(message: str) -> None:
    print(f"note: {printable(message)}", file=sys.stderr)


if __name__ == "__main__":
    entry(main)
