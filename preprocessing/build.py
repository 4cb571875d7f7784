"""Builds a data set: plan, run the shards that are not done, finish with the tables and the manifest."""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from preprocessing.engine import Counts, Job, run_tasks
from preprocessing.photos import Bad, list_photos
from preprocessing.plan import Plan, Settings, make_plan
from preprocessing.resize import Resizer, codec_name
from preprocessing.shard_task import ShardResult, Stopped, finished_shard
from shards.console import JobError, format_bytes, format_count, printable
from shards.dataset import Manifest
from shards.files import atomic_path, atomic_write_json, atomic_write_text, remove_partials
from shards.index import build_index
from shards.layout import (
    CLASSES,
    FORMAT_VERSION,
    MANIFEST,
    PLAN,
    PROVENANCE,
    QUARANTINE,
    SKIPPED,
    group_name,
    shard_tables,
)
from shards.provenance import provenance

LISTING = "listing.parquet"
DEFAULT_BAD_SHARE = 0.01
_TOLERATED_BAD = 25


@dataclass(frozen=True)
class Summary:
    """What a build did: the manifest, photos set aside by reason, bytes read, and the time it took in seconds."""

    manifest: Manifest
    classes_per_group: dict[int, int]
    images_per_group: dict[int, int]
    reasons: Counter[str]
    other_files: int
    source_bytes: int
    jpeg_bytes: int
    seconds: float
    shards_before: int


def build(
    source: Path, out: Path, settings: Settings, *, workers: int, max_bad_share: float | None, rescan: bool
) -> Summary:
    """Make the data set `out` from the photos below `source`, or finish one that was interrupted.

    `max_bad_share`: the share of bad photos that stops the job; None means 1 %, but never fewer than 25 photos.
    Raises `JobError`.
    """
    start = time.monotonic()
    _check_output(source, out)
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(desc="listing photos", unit=" photos", unit_scale=True) as bar:
        cache = out / LISTING
        if rescan:
            cache.unlink(missing_ok=True)
        listing = list_photos(source, cache, lambda n: bar.update(n - bar.n))
    plan = make_plan(listing, settings)
    _claim(out, source, plan)
    remove_partials(out)

    results = {(t.group, t.number): done for t in plan.tasks() if (done := finished_shard(out, t))}
    before = len(results)
    if before and before < plan.shard_count():
        print(f"going on: {before} of {plan.shard_count()} shards were done before")
    bad_by_name = len(plan.bad)
    limit = _bad_limit(max_bad_share, plan.photos)
    _check_bad(plan.bad, results, [], limit, plan.photos)
    job = Job(source, out, Resizer(settings.image_size, settings.quality, settings.resize_filter))
    tasks = (t for t in plan.tasks() if (t.group, t.number) not in results)
    left = len(plan.order) - sum(r.images + len(r.bad) for r in results.values())
    bad_before = bad_by_name + sum(len(r.bad) for r in results.values())
    with tqdm(desc="writing shards", total=left, unit=" images", unit_scale=True, smoothing=0.05) as bar:

        def progress(counts: Counts) -> bool:
            bar.set_postfix_str(f"{format_bytes(counts.source_bytes)} read, {counts.bad} set aside", refresh=False)
            bar.update(counts.photos - bar.n)
            return counts.bad + bad_before <= limit

        try:
            for result in run_tasks(job, tasks, min(workers, plan.shard_count()), progress) if left else ():
                results[result.group, result.number] = result
            bar.update(left - bar.n)
        except Stopped as stopped:
            _check_bad(plan.bad, results, stopped.bad, limit, plan.photos)
            raise AssertionError("stopped without a reason") from stopped
        except KeyboardInterrupt:
            bar.close()
            done = sum(r.images for r in results.values())
            print(
                f"stopped: {len(results)} of {plan.shard_count()} shards ({format_count(done)} images) are done in "
                f"{out}; the same command goes on from there"
            )
            raise
    _check_bad(plan.bad, results, [], limit, plan.photos)
    finished = list(results.values())
    return Summary(
        _finish(out, plan, finished),
        {g: plan.classes.count(g) for g in plan.classes.groups},
        {g: sum(r.images for r in finished if r.group == g) for g in plan.classes.groups},
        Counter(b.reason for b in _all_bad(plan.bad, results)),
        listing.others,
        sum(r.source_bytes for r in finished),
        sum(r.jpeg_bytes for r in finished),
        time.monotonic() - start,
        before,
    )


def _check_output(source: Path, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise JobError(f"{out}: is a file; --out takes a folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise JobError(f"{out}: lies inside the source {source}; choose an --out elsewhere")
    ours = any((out / name).exists() for name in (MANIFEST, PLAN, LISTING))
    if out.is_dir() and not ours and any(out.iterdir()):
        raise JobError(f"{out}: not empty and not a data set; choose an empty or new folder")


def _claim(out: Path, source: Path, plan: Plan) -> None:
    """Mark `out` as this plan's; raises `JobError` where it holds another data set."""
    claim = out / PLAN
    facts = {"fingerprint": plan.fingerprint, "source": source.resolve().name, "codec": codec_name()}
    facts |= asdict(plan.settings)
    if claim.exists():
        before = json.loads(claim.read_text())
        differing = [f"{k} was {before.get(k)}, is {v}" for k, v in facts.items() if before.get(k) != v]
        if before.get("fingerprint") != plan.fingerprint:
            differing = [d for d in differing if not d.startswith("fingerprint")] or ["the list of photos changed"]
            raise JobError(
                f"{out}: holds another data set ({'; '.join(differing)}); choose another --out or delete that folder"
            )
        return
    atomic_write_json(claim, facts)
    atomic_write_json(out / PROVENANCE, provenance())


def _bad_limit(share: float | None, photos: int) -> float:
    return max(DEFAULT_BAD_SHARE * photos, _TOLERATED_BAD) if share is None else share * photos


def _all_bad(by_name: list[Bad], results: dict[tuple[int, int], ShardResult]) -> list[Bad]:
    return by_name + [bad for key in sorted(results) for bad in results[key].bad]


def _check_bad(
    by_name: list[Bad],
    results: dict[tuple[int, int], ShardResult],
    unfinished: list[Bad],
    limit: float,
    photos: int,
) -> None:
    bad = _all_bad(by_name, results) + unfinished
    if len(bad) <= limit:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(b.reason for b in bad).most_common())
    raise JobError(
        f"{len(bad)} of {photos} photos are bad ({reasons}; e.g. {printable(bad[-1].source)}), more than the limit of "
        f"{limit:.0f}; mend the source, or raise --max-bad-share and run the same command again"
    )


def _finish(out: Path, plan: Plan, results: list[ShardResult]) -> Manifest:
    """Write the tables, the index and, last of all, the manifest."""
    results = sorted(results, key=lambda r: (r.group, r.number))
    classes = replace(plan.classes, images=_images_per_class(out, plan))
    classes.save(out / CLASSES)
    skipped = pa.table(
        {
            "source": plan.paths.take(pa.array(plan.skipped)),
            "east": plan.east[plan.skipped],
            "north": plan.north[plan.skipped],
        }
    )
    with atomic_path(out / SKIPPED) as partial:
        pq.write_table(skipped, partial)
    bad = _all_bad(plan.bad, {(r.group, r.number): r for r in results})
    lines = [json.dumps(asdict(b), ensure_ascii=True) + "\n" for b in bad]
    atomic_write_text(out / QUARANTINE, "".join(lines))
    build_index(out, classes.groups)
    settings = plan.settings
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        revision=1,
        **asdict(settings),
        codec=codec_name(),
        utm_zone=classes.zone,
        groups=len(classes.groups),
        classes=len(classes),
        shards=len(results),
        images=sum(r.images for r in results),
        skipped=len(plan.skipped),
        quarantined=len(bad),
        bytes=sum(r.tar_bytes for r in results),
        fingerprint=plan.fingerprint,
    )
    manifest.save(out / MANIFEST)
    return manifest


def _images_per_class(out: Path, plan: Plan) -> np.ndarray:
    images = np.zeros(len(plan.classes), np.int64)
    for group in plan.classes.groups:
        first = int(np.searchsorted(plan.classes.group, group))
        for task_table in shard_tables(out):
            if task_table.parent.name == group_name(group):
                labels = pq.read_table(task_table, columns=["label"])["label"].to_numpy()
                images[first : first + plan.classes.count(group)] += np.bincount(
                    labels, minlength=plan.classes.count(group)
                )
    return images
