"""Four ways to find the database images that look like a query: exhaustive, IVF, HNSW, and within the top cells."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evaluation.gallery import Gallery
from shards.console import JobError
from training.scoring import top_scores


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

    `weights` float32 [C, D'] scores the classes of the gallery's map, with `bias` [C] for logits. The `top_cells` best
    are searched, and as many more as it takes to have all the images that were asked for.
    """

    name = "within-cells"

    def __init__(self, gallery: Gallery, weights: Tensor, bias: Tensor | None, top_cells: int) -> None:
        self.vectors = torch.from_numpy(gallery.images.vectors)
        self.starts = gallery.starts.tolist()
        self.weights, self.bias, self.top_cells = weights.contiguous(), bias, min(top_cells, len(weights))
        self.bytes = gallery.images.vectors.nbytes + weights.nbytes + gallery.starts.nbytes

    @torch.inference_mode()
    def search(self, vector: np.ndarray, classifier_vector: np.ndarray, count: int) -> np.ndarray:
        """The `count` best images of the searched cells; fewer where all cells together hold fewer."""
        scores = torch.mv(self.weights, torch.from_numpy(classifier_vector))
        if self.bias is not None:
            scores += self.bias
        query = torch.from_numpy(vector)
        runs = self._runs(top_scores(scores[None], self.top_cells)[1][0].tolist())
        if sum(last - first for first, last in runs) < count:
            runs = self._fill_up(scores.argsort(descending=True).tolist(), count)
        likeness = torch.cat([torch.mv(self.vectors[first:last], query) for first, last in runs])
        numbers = np.concatenate([np.arange(first, last) for first, last in runs])
        return numbers[likeness.topk(min(count, len(numbers))).indices.numpy()]

    def _runs(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """First image and the one after the last of each cell."""
        return [(self.starts[row], self.starts[row + 1]) for row in rows]

    def _fill_up(self, rows: Sequence[int], count: int) -> list[tuple[int, int]]:
        """The top cells and those after them, until `count` images are among them."""
        runs, images = [], 0
        for number, (first, last) in enumerate(self._runs(rows)):
            if number >= self.top_cells and images >= count:
                break
            runs.append((first, last))
            images += last - first
        return runs


def load_faiss() -> Any:
    """The FAISS module; JobError says how to install it."""
    try:
        return import_module("faiss")
    except ImportError as error:
        raise JobError('FAISS is not installed: pip install "divide-and-classify[retrieval]"') from error
