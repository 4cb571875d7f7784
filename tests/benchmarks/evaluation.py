"""Ranking of all classes in batches against one query at a time, and retrieval within cells against the whole database.

    python tests/benchmarks/evaluation.py [--quick] [--json FILE]

Rows `batched` and `one-at-a-time` (queries_per_second) rank 140,000 classes of 1,280 dimensions for descriptors that
are there already: `one-at-a-time` scores and fully sorts each query as the reference does, `batched` is
`training.scoring.rank_classes`, `batched-with-confidence` is what evaluate.py does (two forms of scores, confidence,
uncertainty), `products-alone` the matrix product, the limit of them all. Rows `exhaustive`, `ivf`, `hnsw`,
`best-of-cells` and `within-cells` (milliseconds_per_query, recall_at_1) search a database made from a fixed seed: 294
images of 256 dimensions in each of 3,400 cells (with `--quick` 180), one query at a time; `within-cells` searches 5 of
the cells and includes the classifier's ranking. A cell's images share a direction and differ by noise, and the
classifier's weights are the means of the cells' images. Row `predict` (milliseconds_per_photo) answers photos of 512
pixels one at a time as predict.py does once it is loaded: decoding, EfficientNet-B0 at 224 (untrained; shorter side
256), ranking 140,000 classes with confidences. Row `describe` (photos_per_second) decodes and describes such photos in
a batch, as evaluate.py does. All on one thread, except that FAISS builds its indexes on all cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paths  # noqa: F401
import torch
from PIL import Image
from torch.nn import functional as F

from evaluation.answer_photos import Request, answer_photos
from evaluation.gallery import Gallery, Images
from evaluation.localiser import Localiser
from evaluation.ranking import ClassRanker, first_rank
from evaluation.retrieve import measure
from evaluation.searchers import BestOfCells, CellSearcher, FaissSearcher, Searcher, load_faiss
from shards.cell_index import CellIndex
from shards.classes import ClassTable
from shards.console import entry
from shards.files import atomic_write_json
from training.checkpoint import EvaluationWeights
from training.heads import Head
from training.model import GeoModel
from training.presets import TrainConfig
from training.scoring import class_blocks, rank_classes

CLASSES, DIM = 140_000, 1280
CELLS, QUICK_CELLS, IMAGES_PER_CELL, IMAGE_DIM, QUERIES = 3_400, 180, 294, 256, 100
SIGNAL = 0.37  # cosine of an image and its cell's direction


def class_table(count: int) -> ClassTable:
    """`count` cells of 20 m that fill a square, in four groups."""
    side = int(np.ceil(count**0.5))
    number = np.arange(count)
    east, north = 540_000 + number // side * 20, 4_170_000 + number % side * 20
    group = east // 20 % 2 * 2 + north // 20 % 2
    order = np.lexsort((north, east, group))
    group = group[order]
    label = np.concatenate([np.arange(n) for n in np.unique(group, return_counts=True)[1]])
    images = np.full(count, IMAGES_PER_CELL)
    return ClassTable(20, 2, 10, group.astype(np.int32), label.astype(np.int32), east[order], north[order], images)


def rates_of(ways: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, float]:
    """Queries a second of each way (what does it, for so many queries), in turn: medians of `rounds`."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (work, _) in ways.items():
            begun = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begun)
    return {name: queries / statistics.median(times[name]) for name, (_, queries) in ways.items()}


def ranking_rows(classes: ClassTable, heads: dict[int, Head], *, quick: bool) -> list[dict[str, object]]:
    """How many queries a second are ranked in each way, with a check that their scores agree."""
    queries = F.normalize(torch.randn(256 if quick else 512, DIM, generator=torch.Generator().manual_seed(1)))
    few = queries[:8]
    blocks = class_blocks(heads, classes, "raw")

    @torch.inference_mode()
    def alone() -> torch.Tensor:
        best = []
        for query in few:
            scores = torch.cat([torch.mm(query[None], head.weight.T) for head in heads.values()], dim=1)[0]
            best.append(scores[scores.argsort(descending=True)[:20]])
        return torch.stack(best)

    @torch.inference_mode()
    def products() -> None:
        for head in heads.values():
            for part in head.weight.split(1024):
                torch.mm(queries, part.T)

    expected = alone()
    ranker = ClassRanker(heads, classes, torch.device("cpu"))
    answer = ranker.rank(few, forms=("raw",))["raw"]
    difference = float((rank_classes(few, blocks)[1] - expected).abs().max())
    difference = max(difference, float(np.abs(answer.scores - expected.numpy()).max()))
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "one-at-a-time": (alone, len(few)),
        "batched": (lambda: rank_classes(queries, blocks), len(queries)),
        "batched-with-confidence": (
            lambda: ranker.rank(queries[:239], forms=("raw", "cosine"), radii_of=first_rank),
            239,
        ),
        "products-alone": (products, len(queries)),
    }
    return [
        {"name": name, "queries_per_second": rate, "classes": CLASSES, "largest_score_difference": difference}
        for name, rate in rates_of(ways, 2 if quick else 5).items()
    ]


def predict_rows(classes: ClassTable, heads: dict[int, Head]) -> list[dict[str, object]]:
    """Milliseconds from a file to its places, and what they are spent on; photos a second described in a batch."""
    config = TrainConfig(shards="none", out=Path("none"), weights="none").to_json()
    tensors = {group: dict(head.state_dict()) for group, head in heads.items()}
    weights = EvaluationWeights(Path("none"), GeoModel(weights="none").state_dict(), tensors, classes, config)
    localiser = Localiser(weights, torch.device("cpu"))
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"photo": [], "describe": []}
    photos = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(16):
            path = Path(folder) / f"{number}.jpg"
            photos.append(path)
            coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            coarse.resize((512, 512), Image.Resampling.BICUBIC).save(path, quality=90)
            begun = time.perf_counter()
            answered, _ = answer_photos(localiser, [path], Request())
            times["photo"].append(time.perf_counter() - begun)
            assert len(answered[0].places) == 5
            begun = time.perf_counter()
            localiser.describe([path], batch_size=1)
            times["describe"].append(time.perf_counter() - begun)
        rates = rates_of({"describe": (lambda: localiser.describe(photos), len(photos))}, 3)
    photo, describe = (1000 * statistics.median(some[2:]) for some in times.values())
    return [
        {"name": "predict", "milliseconds_per_photo": photo, "of_which_describing": describe, "classes": CLASSES},
        {"name": "describe", "photos_per_second": rates["describe"], "batch": len(photos)},
    ]


def synthetic_city(cells: int) -> tuple[Gallery, Images, torch.Tensor]:
    """A gallery, queries taken in its cells, and a classifier's weights [cells, IMAGE_DIM], from a fixed seed."""
    rng = np.random.default_rng(0)
    classes = class_table(cells)
    directions = _unit(rng.standard_normal((cells, IMAGE_DIM), np.float32))

    def seen(rows: np.ndarray) -> Images:
        noise = rng.standard_normal((len(rows), IMAGE_DIM), np.float32) / np.float32(IMAGE_DIM**0.5)
        noise *= np.float32((1 - SIGNAL**2) ** 0.5)
        noise += np.float32(SIGNAL) * directions[rows]
        place = rng.uniform(0, 20, (2, len(rows)))
        return Images(_unit(noise), classes.cell_east[rows] + place[0], classes.cell_north[rows] + place[1])

    gallery = Gallery.of(seen(np.repeat(np.arange(cells), IMAGES_PER_CELL)), CellIndex(classes))
    queries = seen(rng.integers(0, cells, QUERIES))
    weights = gallery.images.vectors.reshape(cells, IMAGES_PER_CELL, IMAGE_DIM).mean(axis=1)
    return gallery, queries, F.normalize(torch.from_numpy(weights))


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def retrieval_rows(cells: int) -> list[dict[str, object]]:
    """Time and recall of every way of searching."""
    gallery, queries, weights = synthetic_city(cells)
    rows: list[dict[str, object]] = []
    for name in ("exhaustive", "ivf", "hnsw", "best-of-cells", "within-cells"):
        begun = time.perf_counter()
        threads = load_faiss().omp_get_max_threads()
        searcher: Searcher
        if name == "within-cells":
            searcher = CellSearcher(gallery, weights, None, 5)
        else:
            searcher = BestOfCells(gallery) if name == "best-of-cells" else FaissSearcher(gallery, name)
        built = time.perf_counter() - begun
        load_faiss().omp_set_num_threads(1)
        row = measure(searcher, gallery, queries, queries.vectors, 25.0)
        load_faiss().omp_set_num_threads(threads)
        rows.append(
            {
                "name": name,
                "milliseconds_per_query": row.milliseconds_per_query,
                "recall_at_1": row.r_at_1,
                "recall_at_20": row.r_at_20,
                "bytes": row.bytes,
                "build_seconds": built,
                "images": row.images,
                "classes": cells,
            }
        )
        del searcher
    return rows


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller database (within 50 seconds)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    classes = class_table(CLASSES)
    torch.manual_seed(0)
    heads: dict[int, Head] = {group: Head("AAMC", DIM, classes.count(group)) for group in classes.groups}
    rows = [*ranking_rows(classes, heads, quick=arguments.quick), *predict_rows(classes, heads)]
    rows += retrieval_rows(QUICK_CELLS if arguments.quick else CELLS)
    for row in rows:
        facts = "  ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in list(row.items())[1:])
        print(f"{row['name']:<24} {facts}")
    if arguments.json:
        atomic_write_json(arguments.json, rows)


if __name__ == "__main__":
    entry(main)
