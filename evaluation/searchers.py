"""Ways to find the database images that look like a query: exhaustive, IVF, HNSW, the best of each cell, and within
the top cells."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evaluation.gallery import Gallery, Images
from shards.console import JobError

_ADDED = 1 << 16  # images at a time


class Searcher(Protocol):
    """Finds the images of a gallery nearest to one query.

    `search` takes the query's descriptor for retrieval and the one of our model (float32 [D], [D']), and returns up to
    `count` image numbers, best first. `bytes` is the memory that the search needs.
    """

    name: str
    bytes: int

    def search(self, vector: np.ndarray, classifier_vector: np.ndarray, count: int) -> np.ndarray: ...


class FaissSearcher:
    """A FAISS index over all images (inner product of unit vectors); `kind` "exhaustive", "ivf" or "hnsw".

    IVF has 4 sqrt(K) lists, of which it visits 16; HNSW 32 links and a search width of 64. JobError without FAISS.
    """

    def __init__(self, gallery: Gallery, kind: str) -> None:
        faiss = load_faiss()
        self.pointer = faiss.swig_ptr
        self.name = kind
        vectors = gallery.images.vectors
        count, dim = vectors.shape
        if kind == "exhaustive":
            self.index: Any = faiss.IndexFlatIP(dim)
            self.bytes = vectors.nbytes
        elif kind == "ivf":
            lists = max(1, min(int(4 * count**0.5), count // 39))
            self.quantizer = faiss.IndexFlatIP(dim)
            self.index = faiss.IndexIVFFlat(self.quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
            self.index.train(vectors[np.random.default_rng(0).permutation(count)[: 50 * lists]])
            self.index.nprobe = 16
            self.bytes = vectors.nbytes + 8 * count + 4 * lists * dim
        else:
            self.index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efSearch = 64
            self.bytes = vectors.nbytes + count * 4 * 2 * 32
        self.index.add(vectors)

    def search(self, vector: np.ndarray, classifier_vector: np.ndarray, count: int) -> np.ndarray:
        """The `count` best images; the classifier is not asked."""
        vector, (found, scores) = np.ascontiguousarray(vector), _answers(count)
        pointer = self.pointer  # as within cells, so that times compare; it keeps nothing alive
        self.index.search_c(1, pointer(vector), count, pointer(scores), pointer(found))
        return found[found >= 0]


class BestOfCells:
    """Compares the query with all images and names the best one of each cell: exhaustive search whose answers are
    other places, as those within cells are."""

    name = "best-of-cells"

    def __init__(self, gallery: Gallery) -> None:
        self.vectors = torch.from_numpy(gallery.images.vectors)
        self.firsts = gallery.firsts
        self.bytes = gallery.images.vectors.nbytes + self.firsts.nbytes

    def search(self, vector: np.ndarray, classifier_vector: np.ndarray, count: int) -> np.ndarray:
        """The best image of each of `count` cells; the classifier is not asked."""
        scores = torch.mv(self.vectors, torch.from_numpy(vector)).numpy()
        best = np.maximum.reduceat(scores, self.firsts)
        ends = np.append(self.firsts[1:], len(scores))
        cells = [slice(self.firsts[cell], ends[cell]) for cell in np.argsort(-best)[:count]]
        return np.array([cell.start + scores[cell].argmax() for cell in cells])


class CellSearcher:
    """Ranks the classes, then compares the query with the images of the best only.

    `weights` float32 [C, D'] score the classes of the gallery's map, with `bias` [C] for logits; classes without
    images are left out. Each answer is another place: first the best image of each of the `top_cells` best classes,
    the most alike first, then an image of each class that follows. The images lie, a byte a number, in an inverted
    file of FAISS whose lists are the cells and whose coarse quantiser is the classifier. Their distances are squared
    ones of bytes, which FAISS sums as whole numbers: of unit vectors the nearest is the most alike. JobError without
    FAISS.
    """

    name = "within-cells"

    def __init__(self, gallery: Gallery, weights: Tensor, bias: Tensor | None, top_cells: int) -> None:
        faiss = load_faiss()
        self.pointer = faiss.swig_ptr
        sizes = np.diff(gallery.starts)
        kept = np.flatnonzero(sizes)
        self.has_bias, self.top_cells = bias is not None, min(top_cells, len(kept))
        scores = (weights if bias is None else torch.column_stack([weights, bias])).numpy()
        rows = np.ascontiguousarray(scores[kept])
        self.classes: Any = faiss.IndexFlatIP(rows.shape[1])
        self.classes.add(rows)
        vectors = gallery.images.vectors[: gallery.starts[-1]]
        self.quantizer = faiss.IndexFlatIP(vectors.shape[1])  # FAISS wants one; the lists are named to it instead
        self.index: Any = faiss.IndexIVFScalarQuantizer(
            self.quantizer,
            vectors.shape[1],
            len(rows),
            faiss.ScalarQuantizer.QT_8bit_direct,
            faiss.METRIC_L2,
            False,  # the vectors themselves, not what they differ by from a list's centre
        )
        self.index.is_trained = True
        self.scale = np.float32(127 / max(vectors.max(initial=0), -vectors.min(initial=0), 1e-9))
        cells = np.repeat(np.arange(len(rows)), sizes[kept])
        numbers = np.arange(len(vectors))
        for first in range(0, len(vectors), _ADDED):
            block = slice(first, first + _ADDED)
            added = self._to_bytes(vectors[block]), numbers[block], cells[block]
            self.index.add_core(len(added[0]), *map(faiss.swig_ptr, added))
        self.central = _most_central(gallery.images, cells, gallery.starts[kept])
        self.bytes = vectors.nbytes // 4 + numbers.nbytes + rows.nbytes

    def search(self, vector: np.ndarray, classifier_vector: np.ndarray, count: int) -> np.ndarray:
        """`count` images of as many cells; the most alike of all others behind them where there are fewer cells."""
        if self.has_bias:
            classifier_vector = np.append(classifier_vector, np.float32(1))
        pointer = self.pointer  # FAISS's methods for Python check and allocate: 10 us of 75 a query
        cells, scores = _answers(min(max(self.top_cells, count), self.classes.ntotal))
        self.classes.search_c(1, pointer(classifier_vector), len(cells), pointer(scores), pointer(cells))
        vector = self._to_bytes(vector)
        copies = np.empty((self.top_cells, len(vector)), np.float32)
        copies[:] = vector
        best, distances = _answers(self.top_cells)
        self.index.nprobe = 1
        self.index.search_preassigned_c(
            len(copies), pointer(copies), 1, pointer(cells), pointer(scores), pointer(distances), pointer(best), False
        )
        places = np.concatenate([best[distances.argsort()], self.central[cells[self.top_cells :]]])
        if len(places) >= count:
            return places[:count]
        self.index.nprobe = len(cells)
        others = self.index.search_preassigned(vector[None], count + len(places), cells[None], None)[1][0]
        others = others[(others >= 0) & ~np.isin(others, places)]
        return np.concatenate([places, others])[:count]

    def _to_bytes(self, vectors: np.ndarray) -> np.ndarray:
        """Whole numbers from 1 to 255 for numbers up to the largest of the images', as the float32 that FAISS takes."""
        scaled = vectors * self.scale
        np.rint(scaled, out=scaled)
        np.clip(scaled, -127, 127, out=scaled)
        scaled += 128
        return scaled


def _answers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for FAISS's answers: int64 and float32 [count]."""
    return np.empty(count, np.int64), np.empty(count, np.float32)


def _most_central(images: Images, cells: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64 [C]: of each cell's images, which begin at `starts`, the number of the one nearest to their middle."""
    counts = np.bincount(cells)
    off = [
        position[: len(cells)] - (np.add.reduceat(position[: len(cells)], starts) / counts)[cells]
        for position in (images.east, images.north)
    ]
    return np.lexsort((np.hypot(*off), cells))[starts]


def load_faiss() -> Any:
    """The FAISS module; JobError says how to install it."""
    try:
        return import_module("faiss")
    except ImportError as error:
        raise JobError('FAISS is not installed: pip install "divide-and-classify[retrieval]"') from error
