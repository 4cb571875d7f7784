"""What the benchmarks found, for readers: a dated section of RESULTS.md and a picture of the ratios.

    python tests/benchmarks/render.py [--quick] [JSON ...] [--results FILE] [--picture FILE]

Reads the rows that the other scripts leave by --json (default: build/*.json) and puts a section before the others in
tests/benchmarks/RESULTS.md: date, this machine, versions, how many times as fast as each peer, and every row in
tables. A section of the same heading is replaced. The picture (default: docs/images/speed.png) shows the same ratios.
Run it on the machine that measured.
"""

import argparse
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import paths

from shards.console import JobError, entry, format_bytes
from shards.files import atomic_write_bytes, atomic_write_text
from shards.provenance import provenance

Row = dict[str, object]
METRICS = {  # what a row was timed by, and whether more is better
    "images_per_second_per_core": ("images/s", True),
    "images_per_second": ("images/s", True),
    "queries_per_second": ("queries/s", True),
    "milliseconds_per_query": ("ms", False),
    "milliseconds_per_photo": ("ms", False),
    "milliseconds": ("ms", False),
    "seconds": ("s", False),
}
WARM, DISK = {"storage": "warm", "cores": 1}, {"storage": "hdd", "cores": 1}


@dataclass(frozen=True)
class Duel:
    """Rows that are compared: fields that pick ours and the peer's, and fields in which the two must be alike."""

    what: str  # heading of its bars; may name fields of our row, and `kilobytes` of a photo
    peer: str  # who it is, for readers
    ours: Row
    theirs: Row
    alike: tuple[str, ...] = ()


RESIZING = "Photos of {kilobytes:.0f} kB, 512 to 224 pixels, into shards, one core"
LOADING = "Photos to augmented batches, 224 pixels, page cache, one core"
FROM_DISK = "Photos to augmented batches, simulated hard disk of 200 reads a second"
HEAD = "Margin head, forward and backward, 35,000 classes"
TRAINING = "Training EfficientNet-B0 from photos on disk, {device}"
RANKING = "Ranking {classes:,} classes, a query"
SEARCHING = "One query among {images:,} photos, within cells"
INDEXED, STREAM = {"name": "indexed", "decoder": "cpu"}, {"name": "stream", "decoder": "cpu"}
DUELS = [
    Duel(RESIZING, "Pillow, bicubic", {"name": "ours"}, {"name": "pillow"}, ("photo_bytes",)),
    Duel(RESIZING, "img2dataset", {"name": "ours"}, {"name": "img2dataset"}, ("photo_bytes",)),
    Duel(LOADING, "reference's loader", INDEXED | WARM, {"name": "reference-files"} | WARM),
    Duel(LOADING, "webdataset, torchvision", INDEXED | WARM, {"name": "webdataset-torchvision"} | WARM),
    Duel(LOADING, "webdataset, simplejpeg and OpenCV", INDEXED | WARM, {"name": "webdataset-simplejpeg"} | WARM),
    Duel(LOADING, "DALI's own reader, on the CPU", INDEXED | WARM, {"name": "dali-webdataset"} | WARM),
    Duel(LOADING, "LitData, torchvision", INDEXED | WARM, {"name": "litdata"} | WARM),
    Duel(FROM_DISK, "reference's loader", STREAM | DISK, {"name": "reference-files"} | DISK),
    Duel(HEAD, "plain autograd", {"name": "head"}, {"name": "head-plain"}),
    Duel(TRAINING, "reference's loop", {"name": "end-to-end-paper-b0"}, {"name": "end-to-end-reference"}),
    Duel(RANKING, "one at a time, full sort", {"name": "batched"}, {"name": "one-at-a-time"}),
    Duel(SEARCHING, "exhaustive (FAISS flat)", {"name": "within-cells"}, {"name": "exhaustive"}),
    Duel(SEARCHING, "the best photo of each cell", {"name": "within-cells"}, {"name": "best-of-cells"}),
    Duel(SEARCHING, "HNSW (FAISS)", {"name": "within-cells"}, {"name": "hnsw"}),
    Duel(SEARCHING, "IVF (FAISS)", {"name": "within-cells"}, {"name": "ivf"}),
]  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a peer, and the two figures."""

    what: str
    peer: str
    times: float
    ours: float
    theirs: float
    unit: str


def read_rows(files: Iterable[Path]) -> list[Row]:
    """The rows of all files. Raises `JobError` naming a file that holds none."""
    rows: list[Row] = []
    for file in files:
        try:
            found = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise JobError(f"{file}: no JSON ({error}); write it anew by --json") from None
        if not isinstance(found, list) or not all(isinstance(row, dict) and "name" in row for row in found):
            raise JobError(f"{file}: not the rows of a benchmark; write it anew by --json")
        rows += found
    return rows


def metric_of(row: Row) -> str | None:
    """The field that a row was timed by."""
    return next((metric for metric in METRICS if metric in row), None)


def ratios(rows: list[Row]) -> list[Ratio]:
    """Every comparison that the rows allow, in the order of `DUELS`."""
    found = []
    for duel in DUELS:
        for mine in (row for row in rows if duel.ours.items() <= row.items()):
            same = duel.theirs | {field: mine[field] for field in duel.alike}
            for theirs in (row for row in rows if same.items() <= row.items()):
                metric = metric_of(mine)
                assert metric is not None
                unit, more_is_better = METRICS[metric]
                a, b = float(str(mine[metric])), float(str(theirs[metric]))
                times = a / b if more_is_better else b / a
                what = duel.what.format(kilobytes=float(str(mine.get("photo_bytes", 0))) / 1000, **mine)
                found.append(Ratio(what, duel.peer, times, a, b, unit))
    order = list(dict.fromkeys(ratio.what for ratio in found))  # photos of two sizes are two headings
    return sorted(found, key=lambda ratio: order.index(ratio.what))


def machine() -> str:
    """Processor, cores and memory of this machine."""
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    model = {key.strip(): value.strip() for key, value in facts.items()}.get("model name", "unknown processor")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {format_bytes(memory)} of memory"


def section(heading: str, setting: str, rows: list[Row]) -> str:
    """The section as Markdown."""
    parts = [heading, setting]
    compared = [[r.what, r.peer, number(r.ours), number(r.theirs), r.unit, f"{r.times:.2f}"] for r in ratios(rows)]
    if compared:
        parts.append(table(["what", "beside", "ours", "theirs", "", "times as fast"], compared))
    for fields, alike in families(rows):
        columns = list(dict.fromkeys(key for row in alike for key in row))
        shared = [c for c in columns if c != "name" and len(alike) > 1 and len({str(row.get(c)) for row in alike}) == 1]
        columns = [c for c in columns if c not in shared]
        facts = ", ".join(f"{words(c)} {number(alike[0][c])}" for c in shared)
        parts.append(f"Rows timed in {words(fields)}{': ' if facts else ''}{facts}")
        parts.append(table([words(c) for c in columns], [[number(row.get(c)) for c in columns] for row in alike]))
    return "\n\n".join(parts) + "\n"


def families(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows that belong in one table: those timed by the same field, or else those of the same fields."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(metric_of(row) or ", ".join(key for key in row if key != "name"), []).append(row)
    yield from kinds.items()


def words(field: str) -> str:
    """`images_per_second` as `images per second`."""
    return field.replace("_", " ")


def number(value: object) -> str:
    """Three figures of a measurement, everything else as it is."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def insert_section(page: str, text: str) -> str:
    """`page` with the section before all others, in place of one of the same heading."""
    intro, *sections = page.split("\n## ")
    heading = text.splitlines()[0].removeprefix("## ")
    others = [s for s in sections if s.splitlines()[0] != heading]
    return "\n## ".join([intro, text.removeprefix("## "), *others])


def draw(found: list[Ratio], caption: str) -> bytes:
    """A PNG of bars, one a peer, on a paper of its own so that it reads on any background."""
    from matplotlib.figure import Figure

    ink, faint, paper, faster, slower = "#202124", "#5f6368", "#ffffff", "#4477aa", "#ee8833"
    headings = len({ratio.what for ratio in found})
    lines = len(found) + 1.5 * headings
    height = 1.1 + 0.3 * lines  # inches; 1.1 of them for title and caption
    figure = Figure(figsize=(9, height), dpi=160, facecolor=paper)
    figure.text(0.02, 1 - 0.3 / height, "How many times as fast as", size=13, weight="bold", color=ink, va="center")
    figure.text(0.02, 0.22 / height, f"{caption} Logarithmic scale.", size=8, color=faint, va="center")
    axes = figure.add_axes((0.02, 0.5 / height, 0.96, 1 - 1.1 / height))
    axes.set_axis_off()
    low, high = min(1.0, *(r.times for r in found)), max(2.0, *(r.times for r in found))
    decades = math.log10(high / low)
    names = 0.09 * max(len(ratio.peer) for ratio in found)  # inches, of 8.64
    left = -2 * decades * names / (8.64 - names)
    axes.set_xlim(left, 2 * decades)  # logarithms of the ratio to `low`; names before 0, figures behind
    axes.set_ylim(lines, 0)
    y, start = 0.0, math.log10(1 / low)
    for i, ratio in enumerate(found):
        if i == 0 or ratio.what != found[i - 1].what:
            axes.text(left, y + 1, ratio.what, va="center", weight="bold", color=ink)
            y += 1.5
        end = math.log10(ratio.times / low)
        axes.barh(y + 0.5, end - start, left=start, height=0.72, color=faster if end >= start else slower)
        axes.plot([start, start], [y, y + 1], color=ink, linewidth=1)
        axes.text(-0.03 * decades, y + 0.5, ratio.peer, va="center", ha="right", color=ink)
        edge = max(start, end) + 0.03 * decades
        axes.text(edge, y + 0.5, f"{ratio.times:.1f}×", va="center", weight="bold", color=ink)
        figures = f"{number(ratio.ours)} against {number(ratio.theirs)} {ratio.unit}"
        axes.text(edge + 0.25 * decades, y + 0.5, figures, va="center", color=faint, size=9)
        y += 1
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def main() -> int:
    """Read the rows, write the section and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", type=Path, nargs="*", metavar="JSON", help="rows of benchmarks (default: build/*.json)"
    )
    parser.add_argument("--quick", action="store_true", help="the rows come from --quick runs: say so")
    parser.add_argument("--results", type=Path, default=paths.HERE / "RESULTS.md", help="page that gets the section")
    parser.add_argument(
        "--picture", type=Path, default=paths.ROOT / "docs" / "images" / "speed.png", help="PNG to write"
    )
    arguments = parser.parse_args()
    files = arguments.files or sorted((paths.ROOT / "build").glob("*.json"))
    if not files:
        raise JobError("build: no rows there; run `make benchmark`, or name the files that --json wrote")
    rows = read_rows(files)
    date = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).date()
    form = "make benchmark, quick form" if arguments.quick else "make benchmark"
    made = provenance()
    versions = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    setting = (
        f"Rows of {', '.join(f.name for f in files)}. {machine()}; commit {str(made['commit'])[:8]}; "
        f"Python {made['python']}, {versions}."
    )
    text = section(f"## {date}: {form}", setting, rows)
    atomic_write_text(arguments.results, insert_section(arguments.results.read_text(), text))
    print(f"{arguments.results}: a section of {len(rows)} rows")
    if found := ratios(rows):
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(arguments.picture, draw(found, f"{date}; {machine()}. Both sides measured in turn."))
        print(f"{arguments.picture}: {len(found)} ratios")
    return 0


if __name__ == "__main__":
    entry(main)
