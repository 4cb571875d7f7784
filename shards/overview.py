"""A data set in numbers, for a person: classes, images per class, bytes, and what was left out."""

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np

from shards.checksums import files_below
from shards.console import JobError, format_bytes, format_count, one_line, printable
from shards.dataset import Dataset
from shards.layout import INDEX, QUARANTINE, SHARD_KINDS, shard_tables
from shards.writer import shard_facts

_BAR = 40
_STEPS = (1, 1.5, 2, 3, 5, 7)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a data set by what they are for. `framing`: tar headers, labels and padding."""

    jpeg: int
    framing: int
    dali_index: int
    tables: int
    flat_index: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.jpeg + self.framing + self.dali_index + self.tables + self.flat_index


def measure_sizes(dataset: Dataset) -> Sizes:
    """Add up the bytes of a data set's files; raises `JobError` where a shard is missing or damaged."""
    if dataset.store:
        found = dataset.store.sizes()
    else:
        files = (name for name in files_below(dataset.path) if (dataset.path / name).is_file())
        found = {name: (dataset.path / name).stat().st_size for name in files}
    jpeg, sizes = 0, dict.fromkeys(SHARD_KINDS, 0)
    for table in shard_tables(dataset.path):
        name = str(table.relative_to(dataset.path).with_suffix(""))
        try:
            jpeg += int(shard_facts(table)["jpeg_bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{dataset.place}/{name}.parquet: {one_line(error)}; run shards/verify.py --repair"
            ) from None
        for kind in sizes:
            if f"{name}.{kind}" not in found:
                raise JobError(f"{dataset.place}/{name}.{kind}: missing; run shards/verify.py --repair")
            sizes[kind] += found[f"{name}.{kind}"]
    flat = sum(size for name, size in found.items() if name.startswith(f"{INDEX}/"))
    return Sizes(jpeg, sizes["tar"] - jpeg, sizes["idx"], sizes["parquet"], flat)


def count_reasons(dataset: Dataset) -> Counter[str]:
    """How many photos were set aside for each reason; raises `JobError` where that list is damaged."""
    path = dataset.path / QUARANTINE
    try:
        with open(path, encoding="utf-8") as file:
            return Counter(str(json.loads(line)["reason"]) for line in file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(f"{path}: damaged ({error}); run shards/verify.py --repair") from None


def histogram(images: np.ndarray) -> list[tuple[int, int, int]]:
    """How many classes have how many images: rows of (from, to, classes), six steps to a factor of ten.

    `images`: int64 [C]. Steps below the first and above the last class are left out.
    """
    edges = [0, *sorted({int(step * 10**power) for power in range(12) for step in _STEPS})]
    counts = np.histogram(images, [*edges, np.inf])[0]
    used = np.flatnonzero(counts)
    if not len(used):
        return []
    return [(edges[i], edges[i + 1] - 1, int(counts[i])) for i in range(used[0], used[-1] + 1)]


def describe(dataset: Dataset) -> str:
    """The whole overview as text; raises `JobError` where the data set is damaged."""
    parts = [_heading(dataset), _groups(dataset), _histogram_text(dataset), _sizes_text(dataset), _left_out(dataset)]
    return "\n\n".join(parts)


def _heading(dataset: Dataset) -> str:
    made, classes = dataset.manifest, dataset.classes
    name = printable(dataset.place)
    return "\n".join(
        [
            f"{name}: {format_count(made.images, 'image')} of {format_count(made.classes, 'class')}",
            f"  cells      {made.M} m, {format_count(made.groups, 'group')} (N = {made.N}), "
            f"at least {format_count(made.min_images, 'photo')} a class",
            f"  place      {classes.place}",
            f"  photos     {made.image_size} x {made.image_size} pixels, JPEG quality {made.quality}, "
            f"{made.resize_filter} filter ({made.codec})",
            f"  on disk    {format_count(made.shards, 'shard')}, format version {made.format_version}, "
            f"revision {made.revision}, fingerprint {made.fingerprint[:12]}",
        ]
    )


def _groups(dataset: Dataset) -> str:
    heads = ("group", "classes", "images", "least", "median", "most")
    rows = [(str(g), dataset.classes.of_group(g).images) for g in dataset.classes.groups]
    rows.append(("all", dataset.classes.images))
    lines = [_row(heads)]
    for name, images in rows:
        figures = (len(images), images.sum(), images.min(), int(np.median(images)), images.max())
        lines.append(_row((name, *(format_count(int(f)) for f in figures))))
    return "\n".join(lines) + "\n(least, median, most: images a class)"


def _row(cells: tuple[str, ...]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, (5, 9, 12, 7, 7, 7), strict=True))


def _histogram_text(dataset: Dataset) -> str:
    rows = histogram(dataset.classes.images)
    most = max(count for _, _, count in rows)
    lines = ["images a class"]
    for low, high, count in rows:
        label = f"{low:,} - {high:,}" if high > low else f"{low:,}"
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        lines.append(f"  {label:>17}  {bar} {format_count(count)}")
    return "\n".join(lines)


def _sizes_text(dataset: Dataset) -> str:
    sizes, images = measure_sizes(dataset), max(dataset.manifest.images, 1)
    names = {
        "JPEG": sizes.jpeg,
        "tar headers, labels, padding": sizes.framing,
        "sample tables": sizes.tables,
        "DALI indexes": sizes.dali_index,
        "flat index": sizes.flat_index,
        "together": sizes.total,
    }
    lines = [f"{'bytes':<30}  {'a sample':>9}  {'all':>9}  {'share':>6}"]
    for name, size in names.items():
        lines.append(f"  {name:<28}  {size / images:9,.0f}  {format_bytes(size):>9}  {size / sizes.total:6.1%}")
    return "\n".join(lines)


def _left_out(dataset: Dataset) -> str:
    made, reasons = dataset.manifest, count_reasons(dataset)
    lines = [f"left out  {format_count(made.skipped, 'photo')} in cells with fewer than {made.min_images}"]
    lines.append(f"          {format_count(made.quarantined, 'bad photo')}{':' if reasons else ''}")
    lines += [f"            {format_count(count):>9}  {printable(reason)}" for reason, count in reasons.most_common()]
    empty = int(np.count_nonzero(dataset.classes.images == 0))
    if empty:
        lines.append(
            f"          {format_count(empty, 'class')} without a photo left (all were bad), which are never drawn"
        )
    return "\n".join(lines)
