"""Plans what new photos change in a finished data set: which join classes, which cells become classes, what stays
skipped. Labels that exist stay; new classes follow those of their group, sorted among themselves."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.coordinates import hash_files, identify, locate
from preprocessing.finishing import State
from preprocessing.partition import CellBox, make_classes
from preprocessing.photos import Bad, Listing
from preprocessing.plan import class_order
from preprocessing.revisions import PLANNED, SKIPPED_COLUMNS, Revision, photo_table, read_bad
from preprocessing.sources import Source, prefix, split_sample, turns
from shards.cell_index import CellIndex
from shards.classes import ClassTable, grid_index, number_within
from shards.files import read_table
from shards.layout import QUARANTINE, SHARD_SAMPLES, SKIPPED, shard_numbers, shard_tables
from shards.names import hash_names, names_and_keys


@dataclass(frozen=True)
class Gain:
    """What an addition brings: photos that were new and those known before, images (planned ones, until those are known
    that are set aside), and the new classes."""

    new: int
    known: int
    images: int
    classes: ClassTable


def plan_addition(out: Path, state: State, source: Source, listing: Listing) -> tuple[Revision, Gain]:
    """The revision that adds the photos of `listing`, those of `source`, to the data set `out`."""
    sources = state.sources
    number = sources.index(source) if source in sources else len(sources)
    zone = state.classes.zone
    names, _ = identify(listing)
    places, _, named_bad = locate(listing, names, zone, state.classes.southern if zone else None)
    usable = np.isfinite(places.east)
    fresh = np.flatnonzero(usable & ~np.isin(names, _known(out, sources, source)))
    start, nothing = (pa.scalar(text, pa.large_string()) for text in (prefix(number), ""))
    paths = pc.binary_join_element_wise(start, listing.paths.take(pa.array(fresh)), nothing)
    candidates = pa.concat_tables([photo_table(paths, places, fresh), state.skipped.cast(SKIPPED_COLUMNS)])
    crops = _crops(candidates["source"], [*sources, source])
    row, classes, added = _classify(candidates, crops, state)
    samples = plan_samples(_samples(candidates, row, classes, crops), state.settings.seed, out)
    seen = {b.source for b in state.bad}
    bad = [Bad(prefix(number) + b.source, b.reason, b.detail) for b in [*listing.bad, *named_bad]]
    revision = Revision(
        2 + len(state.revisions),
        source,
        samples,
        classes,
        candidates.take(pa.array(np.flatnonzero(row < 0))),
        state.bad + [b for b in bad if b.source not in seen],
        listing.found,
    )
    return revision, Gain(len(fresh), int(usable.sum()) - len(fresh), len(samples), added)


def plan_samples(samples: pa.Table, seed: int, out: Path) -> pa.Table:
    """Deal samples (columns `PLANNED`, `number` yet unset) out to new shards of their groups, in order of label and a
    seeded shuffle within it."""
    group, label = samples["group"].to_numpy().astype(np.int64), samples["label"].to_numpy()
    _, row = np.unique(group << 32 | label, return_inverse=True)
    order = class_order(row.astype(np.int32), names_and_keys(_large(samples["source"]))[1], seed, 1)
    samples, group = samples.take(pa.array(order)), group[order]
    shards = Counter(shard_numbers(table.stem)[0] for table in shard_tables(out))
    first = np.array([shards[g] for g in group.tolist()], np.int64)
    numbers = pa.array((first + number_within(group) // SHARD_SAMPLES).astype(np.int32))
    return samples.set_column(PLANNED.names.index("number"), PLANNED.field("number"), numbers)


def _classify(candidates: pa.Table, crops: np.ndarray, state: State) -> tuple[np.ndarray, ClassTable, ClassTable]:
    """The row of each candidate in the class table from now on (-1: in none), that table, and what is new in it."""
    old, M, N = state.classes, state.settings.M, state.settings.N
    own = [grid_index(candidates[axis].to_numpy(), M) for axis in ("east", "north")]
    box = CellBox.around(*own)
    codes, of_candidate = np.unique(box.codes(*own), return_inverse=True)
    images = np.bincount(of_candidate, weights=np.maximum(crops, 1), minlength=len(codes))
    cells = box.indices(codes)
    corners = [index * M for index in cells]
    is_new = (images >= state.settings.min_images) & (CellIndex(old).find(*corners) < 0)
    east, north = (index[is_new] for index in cells)
    added, _ = make_classes(east, north, np.zeros(len(east), np.int64), M=M, N=N, zone=old.zone)
    first = np.array([old.count(g) for g in added.group.tolist()], np.int32)
    added = replace(added, label=first + added.label)
    names = ("group", "label", "cell_east", "cell_north", "images")
    columns = {name: np.concatenate([getattr(old, name), getattr(added, name)]) for name in names}
    order = np.lexsort((columns["label"], columns["group"]))
    classes = ClassTable(
        M, N, old.zone, **{name: values[order] for name, values in columns.items()}, southern=old.southern
    )
    return CellIndex(classes).find(*corners)[of_candidate], classes, added


def _samples(candidates: pa.Table, row: np.ndarray, classes: ClassTable, crops: np.ndarray) -> pa.Table:
    """Candidates that are in a class, panoramas crop by crop, with the columns `PLANNED`."""
    photos = np.flatnonzero(row >= 0)
    times = crops[photos]
    repeated = np.repeat(photos, np.maximum(times, 1))
    table = candidates.take(pa.array(repeated))
    if times.any():
        names = table["source"].to_pylist()
        each = (turns(count) or [""] for count in times.tolist())
        ends = (turn for crop_turns in each for turn in crop_turns)
        table = table.set_column(
            0,
            SKIPPED_COLUMNS.field("source"),
            pa.array([f"{n}#{t}" if t else n for n, t in zip(names, ends, strict=True)], pa.large_string()),
        )
    of_class = row[repeated]
    columns = {name: table[name] for name in SKIPPED_COLUMNS.names}
    columns |= {"group": classes.group[of_class], "label": classes.label[of_class]}
    columns["number"] = np.zeros(len(repeated), np.int32)
    return pa.table({name: columns[name] for name in PLANNED.names}, PLANNED)


def _crops(samples: pa.ChunkedArray, sources: list[Source]) -> np.ndarray:
    """Into how many crops each photo is cut (0: it is taken whole), int64 [n]."""
    crops = [source.crops for source in sources]
    if len(set(crops)) == 1:
        return np.full(len(samples), crops[0], np.int64)
    return np.array([crops[split_sample(sample)[0]] for sample in samples.to_pylist()], np.int64)


def _known(out: Path, sources: list[Source], source: Source) -> np.ndarray:
    """Hashes of what the data set knows of the photos that `source` may hold: samples, skipped and quarantined ones."""
    quarantined = pa.array([b.source for b in read_bad(out / QUARANTINE) if b.sample], pa.string())
    tables = [pa.chunked_array([quarantined]), read_table(out / SKIPPED, ["source"])["source"]]
    hashes = [_identities(names, sources, source) for names in tables]
    for table in shard_tables(out):
        hashes.append(_identities(read_table(table, ["source"])["source"], sources, source))
    return np.concatenate(hashes)


def _identities(samples: pa.ChunkedArray, sources: list[Source], source: Source) -> np.ndarray:
    """What `identify` tells samples' photos apart by, as it does those of `source` have them."""
    if any(s.crops for s in sources):
        samples = pc.replace_substring_regex(samples, r"#\d+(\.\d+)?$", "")
    if not source.is_list:
        return hash_names(_large(samples))
    parts = [np.empty(0, np.uint64)]
    for number, other in enumerate(sources):
        start = prefix(number)
        own = samples.filter(pc.starts_with(samples, start) if start else pc.invert(pc.starts_with(samples, "//")))
        parts.append(hash_files(other.root, _large(pc.utf8_slice_codeunits(own, len(start)))))
    return np.concatenate(parts)


def _large(texts: pa.ChunkedArray) -> pa.Array:
    chunks = texts.cast(pa.large_string()).chunks
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())
