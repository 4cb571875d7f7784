"""Answers for photos that someone names: finding the photos, asking the model, and showing the places."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.calibration import temperature_of
from evaluation.localiser import Localiser
from evaluation.places import KnownPosition, Place, distinct, known_position, top_places
from shards.console import JobError, format_count, printable
from shards.names import PHOTO_EXTENSIONS
from training.queries import SetAside, find_photos
from training.scoring import THRESHOLD_METRES

_EXTENSIONS_LISTED = 5


@dataclass(frozen=True)
class Request:
    """How many places at least how many metres apart, and how photos are read."""

    top: int = 5
    apart: float = THRESHOLD_METRES
    batch_size: int = 16
    threads: int = 1


@dataclass(frozen=True)
class AnsweredPhoto:
    """A photo, where it says that it was taken, and the places that the model names, best first."""

    path: Path
    known: KnownPosition | None
    places: list[Place]


def find_all(names: Sequence[str]) -> tuple[list[Path], list[SetAside], list[Path]]:
    """The photos that files, folders and glob patterns name, each once in the order given; what names nothing; and the
    files of the folders that are no photos by their names, but for hidden ones."""
    found: list[Path] = []
    others: list[Path] = []
    missing: list[SetAside] = []
    for name in names:
        path = Path(name)
        try:
            if not name:  # Path("") would be the current folder
                missing.append(SetAside(Path("''"), "no such photo, folder or pattern"))
            elif path.is_dir():
                found += find_photos(path, others)
            elif path.exists():
                found.append(path)
            elif matches := sorted(glob.glob(name, recursive=True)):
                parts = find_all([glob.escape(match) if not Path(match).exists() else match for match in matches])
                found += parts[0]
                missing += parts[1]
                others += parts[2]
            else:
                missing.append(SetAside(path, "no such photo, folder or pattern"))
        except JobError as error:
            missing.append(SetAside(path, str(error).removeprefix(f"{path}: ")))
    shown = [path for path in dict.fromkeys(others) if not path.name.startswith(".")]
    return list(dict.fromkeys(found)), missing, shown


def describe_others(others: Sequence[Path]) -> str:
    """How many files are left out, and of which extensions."""
    kinds = Counter(printable(path.suffix.lower()) or "without extension" for path in others).most_common()
    listed = [f"{count:,} {kind}" for kind, count in kinds[:_EXTENSIONS_LISTED]]
    if more := sum(count for _, count in kinds[_EXTENSIONS_LISTED:]):
        listed.append(f"{more:,} of other extensions")
    photos = f"({', '.join(PHOTO_EXTENSIONS)} are photos)"
    return f"ignored {format_count(len(others), 'file')} of other kinds: {', '.join(listed)} {photos}"


def answer_photos(
    localiser: Localiser, paths: Sequence[Path], request: Request
) -> tuple[list[AnsweredPhoto], list[SetAside]]:
    """Places for every photo that can be read, in order, and the photos that cannot, with reasons."""
    described = localiser.describe(paths, batch_size=request.batch_size, threads=request.threads, title="describing")
    readable = [i for i in range(len(paths)) if described.readable[i]]
    if not readable:
        return [], list(described.failures)
    photos = [paths[i] for i in readable]
    classes = localiser.classes
    known = [known_position(path, classes.zone, southern=classes.southern) for path in photos]
    vectors = described.vectors[readable]
    return name_places(localiser, vectors, photos, known, request, title="ranking"), list(described.failures)


def name_places(
    localiser: Localiser,
    vectors: Tensor,
    paths: Sequence[Path],
    known: Sequence[KnownPosition | None],
    request: Request,
    title: str | None = None,
) -> list[AnsweredPhoto]:
    """Places for photos by their descriptors float32 [Q, D], in order; `title` as in `Localiser.answer`."""
    # Neighbours of a better cell are dropped from the list, so more cells than places are ranked.
    cells = request.top * localiser.index.most_neighbours(request.apart)
    classes, top, apart = localiser.classes, request.top, request.apart
    shown = partial(distinct, classes=classes, count=top, apart=apart)
    ranked = localiser.answer(vectors, top_k=cells, radii_of=shown, threshold=apart, title=title)[localiser.form]
    return [
        AnsweredPhoto(path, position, top_places(ranked, i, classes, count=top, apart=apart, known=position))
        for i, (path, position) in enumerate(zip(paths, known, strict=True))
    ]


def to_json(answered: Sequence[AnsweredPhoto], failures: Sequence[SetAside], localiser: Localiser) -> str:
    """All answers as JSON: metres, degrees and probabilities from 0 to 1."""
    return json.dumps(to_document(answered, failures, localiser), indent=2)


def to_document(
    answered: Sequence[AnsweredPhoto], failures: Sequence[SetAside], localiser: Localiser
) -> dict[str, Any]:
    """All answers as nested dicts and lists, ready for JSON."""
    return {
        "checkpoint": str(localiser.path),
        "utm_zone": localiser.classes.zone,
        "score_form": localiser.form,
        "temperature": temperature_of(localiser.calibration, localiser.form),
        "photos": [
            {
                "photo": str(photo.path),
                "known_position": asdict(photo.known) if photo.known else None,
                "places": [asdict(place) for place in photo.places],
            }
            for photo in answered
        ],
        "failed": [{"photo": str(failure.path), "reason": failure.reason} for failure in failures],
    }


def to_geojson(answered: Sequence[AnsweredPhoto], failures: Sequence[SetAside], localiser: Localiser) -> str:
    """Places as GeoJSON points (RFC 7946: longitude first), with rank, confidence and radius as properties."""
    features: list[dict[str, Any]] = []
    for photo in answered:
        for rank, place in enumerate(photo.places, start=1):
            facts = {name: value for name, value in asdict(place).items() if name not in ("latitude", "longitude")}
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "Point", "coordinates": [place.longitude, place.latitude]},
                    "properties": {"photo": str(photo.path), "rank": rank, **facts},
                }
            )
    return json.dumps({"type": "FeatureCollection", "features": features}, indent=2)


def to_table(
    answered: Sequence[AnsweredPhoto], failures: Sequence[SetAside], localiser: Localiser, apart: float
) -> str:
    """Answers as a table for a person, with probabilities within `apart` metres; eastings and northings where the class
    map has no UTM zone."""
    within = f"within {apart:.10g} m"
    degrees = bool(localiser.classes.zone)
    first, second = ("latitude", "longitude") if degrees else ("easting m", "northing m")
    wide = max(len(within), 11)
    lines = []
    for photo in answered:
        known = photo.known
        source = {"exif": "EXIF GPS", "name": "name"}.get(known.source, "") if known else ""
        where = f"   ({source}: {known.latitude:.5f}, {known.longitude:.5f})" if known else ""
        lines.append(f"{printable(str(photo.path))}{where}")
        lines.append(f"  {'':>2}  {first:>11}  {second:>11}  {within:>{wide}}  {'68 % within':>11}"
                     + (f"  {'from ' + source:>13}" if known else ""))  # fmt: skip
        for rank, place in enumerate(photo.places, start=1):
            if degrees:
                position = f"{place.latitude:11.5f}  {place.longitude:11.5f}"
            else:
                position = f"{place.east:11.1f}  {place.north:11.1f}"
            distance = f"  {place.distance_m:11,.0f} m" if place.distance_m is not None else ""
            confidence = f"{100 * place.confidence:{wide - 2}.1f} %"
            lines.append(f"  {rank:2}  {position}  {confidence}  {place.uncertainty_m:9,.0f} m{distance}")
        lines.append("")
    count = format_count(len(answered), "photo")
    summary = f"{count} answered" + (f", {len(failures):,} failed" if failures else "")
    found = localiser.calibration
    trust = (
        f"calibrated on {format_count(found.count, 'query')}"
        if found
        else "not calibrated (evaluate.py --val-queries does that)"
    )
    return "\n".join([*lines, f"{summary}; confidence {within}, {trust}"])
