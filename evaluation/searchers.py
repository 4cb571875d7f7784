"""Four ways to find the database images that look like a query: exhaustive, IVF, HNSW, and within the top cells."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evaluation.gallery import Gallery
from shards.console import JobError


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
        found = self.index.search(vector[None], count)[1][0]
        return found[found >= 0]


class CellSearcher:
    """Ranks the classes, then compares the query with the images of the best only.

    An inverted file of FAISS whose lists are the cells and whose coarse quantiser is the classifier: `weights`
    float32 [C, D'] score the classes of the gallery's map, with `bias` [C] for logits. The `top_cells` best are
    searched, and as many more as it takes to have all the images that were asked for. JobError without FAISS.
    """

    name = "within-cells"

    def __init__(self, gallery: Gallery, weights: Tensor, bias: Tensor | None, top_cells: int) -> None:
        faiss = load_faiss()
        self.has_bias = bias is not None
        rows = np.ascontiguousarray((weights if bias is None else torch.column_stack([weights, bias])).numpy())
        self.classes: Any = faiss.IndexFlatIP(rows.shape[1])
        self.classes.add(rows)
        self.sizes, self.top_cells = np.diff(gallery.starts), min(top_cells, len(rows))
        vectors = gallery.images.vectors[: gallery.starts[-1]]
        self.quantizer = faiss.IndexFlatIP(vectors.shape[1])  # FAISS wants one; the lists are named to it instead
        self.index: Any = faiss.IndexIVFFlat(self.quantizer, vectors.shape[1], len(rows), faiss.METRIC_INNER_PRODUCT)
        self.index.is_trained = True
        cells = np.repeat(np.arange(len(rows)), self.sizes)
        numbers = np.arange(len(vectors))
        self.index.add_core(len(vectors), *map(faiss.swig_ptr, (vectors, numbers, cells)))
        self.bytes = vectors.nbytes + numbers.nbytes + rows.nbytes

    def search(self, vector: np.ndarray, classifier_vector: np.ndarray, count: int) -> np.ndarray:
        """The `count` best images of the searched cells; fewer where all cells together hold fewer."""
        if self.has_bias:
            classifier_vector = np.append(classifier_vector, np.float32(1))
        cells = self.classes.search(classifier_vector[None], self.top_cells)[1]
        if self.sizes[cells].sum() < count:
            cells = self.classes.search(classifier_vector[None], len(self.sizes))[1]
            enough = 1 + int(np.searchsorted(self.sizes[cells[0]].cumsum(), count))
            cells = cells[:, : max(self.top_cells, enough)]
        self.index.nprobe = cells.shape[1]
        found = self.index.search_preassigned(vector[None], count, cells, None)[1][0]
        return found[found >= 0]


def load_faiss() -> Any:
    """The FAISS module; JobError says how to install it."""
    try:
        return import_module("faiss")
    except ImportError as error:
        raise JobError('FAISS is not installed: pip install "divide-and-classify[retrieval]"') from error
