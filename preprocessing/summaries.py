"""What a person reads at the end of a build, of a trial run or of a change."""

import numpy as np

from preprocessing.addition import Gain
from preprocessing.finishing import Summary
from preprocessing.photos import list_reasons, reasons_of
from preprocessing.plan import Plan
from preprocessing.trial import UNCUT, Forecast
from shards.classes import ClassTable
from shards.console import format_bytes, format_count, format_duration
from shards.names import PHOTO_EXTENSIONS

_LISTED_CLASSES = 20
_FAR_METRES = 50_000.0


def print_summary(summary: Summary, out: str) -> None:
    """What was built."""
    made = summary.manifest
    _print_groups(summary.classes, summary.images_per_group)
    _print_place(summary.classes)
    print(f"skipped     {format_count(made.skipped, 'photo')} in cells with fewer than {made.min_images} photos")
    reasons = list_reasons(summary.reasons)
    print(f"set aside   {format_count(made.quarantined, 'bad photo')}{f' ({reasons})' if reasons else ''}")
    _print_ignored(summary.other_files)
    print(
        f"bytes       {format_bytes(summary.source_bytes)} of photos -> {format_bytes(made.bytes)} in "
        f"{format_count(made.shards, 'shard')} ({summary.jpeg_bytes / max(made.images, 1):,.0f} bytes of JPEG a photo)"
    )
    before = f" ({format_count(summary.shards_before, 'shard')} done before)" if summary.shards_before else ""
    print(f"finished    {out} in {format_duration(summary.seconds)}{before}")


def print_forecast(made: Forecast, out: str) -> None:
    """What a build would make."""
    plan, trial = made.plan, made.trial
    classes = plan.classes
    _print_groups(classes, {g: int(classes.of_group(g).images.sum()) for g in classes.groups})
    _print_place(classes)
    print(f"skipped     {_describe_small_cells(plan)}")
    unusable = reasons_of(plan.bad)
    print(f"set aside   {format_count(len(plan.bad), 'photo')} by names or list{f' ({unusable})' if unusable else ''}")
    reasons = list_reasons(trial.bad) or "none bad"
    print(
        f"trial       {format_count(trial.tried, 'image')} ({reasons}), "
        f"{trial.images_per_second:,.0f} a second with one worker"
    )
    if made.bad > made.bad_limit:
        print(
            f"bad         about {made.bad:,.0f} of {format_count(plan.photos, 'photo')}: TOO MANY, more than "
            f"{made.bad_limit:,.0f} stop a build (--max-bad-share)"
        )
    if trial.uncut:
        print(f"shapes      {UNCUT}")
    _print_ignored(made.other_files)
    print(f"reads       about {format_bytes(trial.source_bytes_per_image * len(plan.order))} of photos")
    free = ""
    if made.bytes_free is not None:
        verdict = "enough" if made.bytes_free > made.bytes_needed else "NOT ENOUGH"
        free = f", {format_bytes(made.bytes_free)} free: {verdict}"
    print(f"disk        about {format_bytes(made.bytes_needed)} needed{free}")
    print(
        f"time        about {format_duration(made.seconds)} with {format_count(made.workers, 'worker')}, "
        "where disk and network keep up"
    )
    print(f"dry run     nothing was written to {out} but the list of photos, which the build reuses")


def print_recovery(done: tuple[Summary, int, int] | None, out: str) -> None:
    """What trying quarantined photos again brought."""
    if done is None:
        print(f"{out}: none of the quarantined photos can be used yet")
        return
    summary, recovered, tried = done
    print_summary(summary, out)
    print(f"recovered   {format_count(recovered)} of {format_count(tried)} photos that were tried again")


def print_gain(done: tuple[Summary, Gain] | None, out: str) -> None:
    """What an addition brought, and which cells became classes."""
    if done is None:
        print(f"{out}: has all of these photos already, or keeps them in quarantine.jsonl (--retry-quarantined)")
        return
    summary, gain = done
    print_summary(summary, out)
    print(
        f"added       {format_count(gain.images, 'image')} to classes; {format_count(gain.new)} photos were new, "
        f"{format_count(gain.known)} known before"
    )
    print(f"new classes {format_count(len(gain.classes))}")
    rows = zip(
        *(getattr(gain.classes, name).tolist() for name in ("group", "label", "cell_east", "cell_north")), strict=True
    )
    for group, label, east, north in list(rows)[:_LISTED_CLASSES]:
        print(f"            group {group}, label {label}: the cell at {east} east, {north} north")
    if (more := len(gain.classes) - _LISTED_CLASSES) > 0:
        print(f"            and {format_count(more)} more, the last labels in classes.parquet")


def _print_ignored(files: int) -> None:
    if files:
        print(f"ignored     {format_count(files, 'file')} of other kinds ({', '.join(PHOTO_EXTENSIONS)} are photos)")


def _describe_small_cells(plan: Plan) -> str:
    """How many photos lie in cells with too few, and how many of them half of the least number would take in."""
    least = plan.settings.min_images
    corner = np.stack([plan.places.east[plan.skipped], plan.places.north[plan.skipped]], axis=1) // plan.settings.M
    _, cells = np.unique(corner, axis=0, return_counts=True)
    cells = cells * max(plan.settings.crops, 1)
    said = f"{format_count(len(plan.skipped), 'photo')} in {format_count(len(cells), 'cell')} with fewer than {least}"
    taken = cells[cells >= least // 2]
    if least < 2 or not len(taken):
        return said
    return f"{said}; --min-images {least // 2} makes classes of {format_count(len(taken))} of these cells"


def _print_place(classes: ClassTable) -> None:
    print(f"plane       {classes.place}")
    centers = classes.centers()
    away = np.hypot(*(centers - np.median(centers, axis=0)).T)
    if far := int(np.count_nonzero(away > _FAR_METRES)):
        print(
            f"far away    {format_count(far, 'class')} of {len(classes):,}, up to {away.max() / 1000:,.0f} km from the "
            "middle: WRONG COORDINATES?"
        )


def _print_groups(classes: ClassTable, images: dict[int, int]) -> None:
    print(f"\n{'group':>5}  {'classes':>9}  {'images':>12}  {'images a class':>14}")
    rows = [(str(group), classes.count(group), images[group]) for group in classes.groups]
    for name, count, of_group in [*rows, ("all", len(classes), sum(images.values()))]:
        print(f"{name:>5}  {format_count(count):>9}  {format_count(of_group):>12}  {of_group / max(count, 1):14.1f}")
    print()
