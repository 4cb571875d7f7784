"""A data set in pictures: a contact sheet of some classes, and a map of the cells coloured by group."""

import io
import re
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.console import format_count, printable
from shards.dataset import Dataset
from shards.index import GroupIndex, open_index, read_samples
from shards.reader import ShardReader
from shards.upright import open_photo, upright_rgb

_INK, _FAINT, _PAPER, _LINE = (32, 33, 36), (110, 115, 122), (255, 255, 255), (222, 224, 228)
_PALETTE = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8833", "#777777"]
"""Paul Tol's bright scheme and an orange: told apart by colour-blind readers too (personal.sron.nl/~pault)."""
_MAP_PIXELS = 1200
_LARGEST_CELL = 40
_DISCERNIBLE = 6  # pixels of a cell from which on neighbours are told apart and the grid is drawn
_DETAIL = 36
_TILE = 176
_GAP = 8
_EDGE = 28
_CAPTION = 12  # the size of letters

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class _Shown:
    """A photo on the contact sheet: pixels (None where they could not be read) and what stands below."""

    photo: Image.Image | None
    caption: str


def group_colour(group: int, groups: int) -> Rgb:
    """The colour of a group among so many: a palette, beyond it evenly spread hues."""
    if groups <= len(_PALETTE):
        hexadecimal = _PALETTE[group % len(_PALETTE)].removeprefix("#")
        return tuple(bytes.fromhex(hexadecimal))  # type: ignore[return-value]
    hue = group * 0.618033988749895 % 1.0
    return tuple(round(255 * c) for c in hsv_to_rgb(hue, 0.55 + 0.3 * (group % 2), 0.85 - 0.2 * (group % 3 == 2)))  # type: ignore[return-value]


def cell_map(dataset: Dataset) -> Image.Image:
    """A map of the cells, north up: colour tells the group, a paler shade fewer images.

    Where cells are too small to be told apart, the densest part is shown enlarged beside it; cells that share a pixel
    (beyond 2,400 across) mix their colours.
    """
    classes, M = dataset.classes, dataset.manifest.M
    columns = (classes.cell_east - classes.cell_east.min()) // M
    rows = (classes.cell_north.max() - classes.cell_north) // M
    colours = _cell_colours(dataset)
    extent = int(max(columns.max(), rows.max())) + 1
    fold = -(-extent // (2 * _MAP_PIXELS))  # cells that share a pixel, across
    scale = max(1, min(_LARGEST_CELL, _MAP_PIXELS // extent))
    cells = _paint(columns // fold, rows // fold, colours, scale)
    detail = _densest_part(columns, rows, colours) if scale < _DISCERNIBLE else None
    return _frame_map(dataset, cells, M * fold / scale, detail)


def _cell_colours(dataset: Dataset) -> np.ndarray:
    """The colour of every class on the map, uint8 [C, 3]."""
    classes = dataset.classes
    palette = np.array([group_colour(place, len(classes.groups)) for place in range(len(classes.groups))], np.float64)
    log = np.log1p(classes.images)
    strength = 1 - 0.65 * (log.max() - log) / max(float(np.ptp(log)), 1e-9)
    places = np.searchsorted(classes.groups, classes.group)
    return np.rint(255 - strength[:, None] * (255 - palette[places])).astype(np.uint8)


def _paint(columns: np.ndarray, rows: np.ndarray, colours: np.ndarray, scale: int) -> Image.Image:
    """Cells as squares of `scale` pixels; those at the same place mix their colours."""
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    places, at, counts = np.unique(rows * width + columns, return_inverse=True, return_counts=True)
    mixed = [np.bincount(at, weights=colour) / counts for colour in colours.T.astype(np.float64)]
    pixels = np.full((height * width, 3), 255, np.uint8)
    pixels[places] = np.rint(np.stack(mixed, axis=1))
    cells = np.repeat(np.repeat(pixels.reshape(height, width, 3), scale, 0), scale, 1)
    if scale >= _DISCERNIBLE:
        cells[::scale], cells[:, ::scale] = 255, 255
    return Image.fromarray(cells)


def _densest_part(columns: np.ndarray, rows: np.ndarray, colours: np.ndarray) -> Image.Image:
    """The square of `_DETAIL` x `_DETAIL` cells (first on a grid of quarters) that has the most classes, these in its
    middle."""
    quarter = _DETAIL // 4
    blocks, counts = np.unique((rows // quarter << 32) + columns // quarter, return_counts=True)
    steps = [(down << 32) + right for down in range(4) for right in range(4)]
    corners, at = np.unique(blocks[:, None] + steps, return_inverse=True)  # three quarters further, so never below 0
    weights = np.repeat(counts, len(steps))
    corner = int(corners[np.bincount(at.ravel(), weights).argmax()])
    place = quarter * ((corner >> 32) - 3), quarter * (corner % (1 << 32) - 3)
    before = None
    while place != before:  # moved so that what it has is in its middle, it has all that and perhaps more
        top, left = before = place
        inside = (rows >= top) & (rows < top + _DETAIL) & (columns >= left) & (columns < left + _DETAIL)
        ends = [(int(part.min()), int(part.max())) for part in (rows[inside], columns[inside])]
        place = (sum(ends[0]) + 1 - _DETAIL) // 2, (sum(ends[1]) + 1 - _DETAIL) // 2
    part = _paint(columns[inside] - left, rows[inside] - top, colours[inside], _DISCERNIBLE)
    whole = Image.new("RGB", (_DETAIL * _DISCERNIBLE, _DETAIL * _DISCERNIBLE), _PAPER)
    whole.paste(part)
    return whole


def _frame_map(dataset: Dataset, cells: Image.Image, metres_a_pixel: float, detail: Image.Image | None) -> Image.Image:
    """Put title, coordinates, scale bar and legend around the cells."""
    classes, made = dataset.classes, dataset.manifest
    left, top = 110, 92
    beside = left + max(cells.width, 280) + 28  # to the right of the scale bar too
    width = max(beside + 244, 760)
    height = max(top + cells.height + 96, top + 90 + 24 * len(classes.groups) + (0 if detail is None else 270))
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    _write(pen, (_EDGE, 20), _title(dataset), 24)
    what = f"cells of {made.M} m coloured by group (N = {made.N}); {classes.crs}"
    _write(pen, (_EDGE, 54), what, 15, _FAINT)
    page.paste(cells, (left, top))
    pen.rectangle((left - 1, top - 1, left + cells.width, top + cells.height), outline=_LINE)
    west, north = int(classes.cell_east.min()), int(classes.cell_north.max()) + made.M
    south, east_end = int(north - cells.height * metres_a_pixel), int(west + cells.width * metres_a_pixel)
    widest = max(ImageFont.load_default(13).getlength(f"{east:,}") for east in (west, east_end))
    # A step is at least two fifths of what it is made from (20 of 49, say), and labels stand a step apart.
    step = _nice(max(2.5 * (widest + 12), cells.width / 4, cells.height / 4) * metres_a_pixel)
    for east in range(-(-west // step) * step, east_end + 1, step) or (west,):
        x = left + round((east - west) / metres_a_pixel)
        pen.line((x, top + cells.height, x, top + cells.height + 6), _FAINT)
        _write(pen, (x, top + cells.height + 10), f"{east:,}", 13, _FAINT, "ma")
    for at in range(-(-south // step) * step, north + 1, step) or (north,):
        y = top + round((north - at) / metres_a_pixel)
        pen.line((left - 6, y, left, y), _FAINT)
        _write(pen, (left - 10, y), f"{at:,}", 13, _FAINT, "rm")
    _scale_bar(pen, left, top + cells.height + 52, metres_a_pixel)
    x, y = beside, top
    _write(pen, (x, y), "group", 14, _FAINT)
    _write(pen, (x + 190, y), "classes", 14, _FAINT, "ra")
    for place, group in enumerate(classes.groups):
        y = top + 26 + 24 * place
        pen.rectangle((x, y, x + 16, y + 16), fill=group_colour(place, len(classes.groups)))
        _write(pen, (x + 26, y + 8), str(group), 15, anchor="lm")
        _write(pen, (x + 190, y + 8), format_count(classes.count(group)), 15, anchor="rm")
    _write(pen, (x, y + 32), f"paler: fewer images ({classes.images.min()} to {classes.images.max()})", 13, _FAINT)
    if detail is not None:
        _write(pen, (x, y + 64), f"enlarged: the densest {_DETAIL * made.M:,} m", 13, _FAINT)
        page.paste(detail, (x, y + 84))
        pen.rectangle((x - 1, y + 83, x + detail.width, y + 84 + detail.height), outline=_LINE)
    return page


def _scale_bar(pen: ImageDraw.ImageDraw, x: int, y: int, metres_a_pixel: float) -> None:
    metres = _nice(160 * metres_a_pixel)
    length = round(metres / metres_a_pixel)
    pen.line((x, y, x + length, y), _INK, 3)
    for end in (x, x + length):
        pen.line((end, y - 5, end, y + 5), _INK, 2)
    text = f"{metres:,} m" if metres < 1000 else f"{metres / 1000:g} km"
    _write(pen, (x + length + 12, y), f"{text}   north is up", 14, anchor="lm")


def _nice(metres: float) -> int:
    """The largest of 1, 2, 5, 10, 20, ... metres that is not above `metres` (at least 1)."""
    power = 10 ** int(np.floor(np.log10(max(metres, 1.0))))
    return max(int(power * step) for step in (1, 2, 5) if power * step <= max(metres, 1.0))


def contact_sheet(dataset: Dataset, rows: int = 7, columns: int = 7) -> Image.Image:
    """Some classes, a row each, spread over groups and labels, with photos spread over the class."""
    index = open_index(dataset.path, dataset.classes)
    reader = dataset.reader(index)
    chosen = spread_classes(index, rows)
    left = _EDGE + 150
    height = 92 + len(chosen) * (_TILE + 22 + _GAP) + _EDGE // 2
    page = Image.new("RGB", (left + columns * (_TILE + _GAP) + _EDGE - _GAP, height), _PAPER)
    pen = ImageDraw.Draw(page)
    _write(pen, (_EDGE, 20), _title(dataset), 24)
    what = f"a class in each row; {dataset.manifest.image_size} pixels, JPEG quality {dataset.manifest.quality}"
    _write(pen, (_EDGE, 54), what, 15, _FAINT)
    for row, (group, label) in enumerate(chosen):
        y = 92 + row * (_TILE + 22 + _GAP)
        _class_caption(pen, dataset, group, label, y)
        for column, shown in enumerate(_photos(index[group], reader, label, columns)):
            x = left + column * (_TILE + _GAP)
            if shown.photo is None:
                pen.rectangle((x, y, x + _TILE - 1, y + _TILE - 1), fill=_LINE)
                _write(pen, (x + _TILE // 2, y + _TILE // 2), "damaged", 16, (190, 40, 40), "mm")
            else:
                page.paste(shown.photo.resize((_TILE, _TILE), Image.Resampling.BICUBIC), (x, y))
            _write(pen, (x + _TILE // 2, y + _TILE + 3), shown.caption, _CAPTION, _FAINT, "ma")
    reader.close()
    return page


def spread_classes(index: dict[int, GroupIndex], count: int) -> list[tuple[int, int]]:
    """Up to `count` (group, label) that have photos: the groups in turn, labels evenly spread within each."""
    groups = [g for g, of_group in index.items() if len(of_group.labels)]
    chosen = []
    for place, group in enumerate(groups):
        labels = index[group].labels
        wanted = min(len(range(place, count, len(groups))), len(labels))
        at = (np.arange(wanted) + 0.5) * len(labels) / max(wanted, 1)
        chosen += [(turn, group, int(labels[int(i)])) for turn, i in enumerate(at)]
    return [(group, label) for _, group, label in sorted(chosen)]


def _class_caption(pen: ImageDraw.ImageDraw, dataset: Dataset, group: int, label: int, y: int) -> None:
    groups = dataset.classes.groups
    of_group = dataset.classes.of_group(group)
    pen.rectangle((_EDGE, y, _EDGE + 5, y + _TILE - 1), fill=group_colour(groups.index(group), len(groups)))
    _write(pen, (_EDGE + 16, y), f"group {group}", 18)
    _write(pen, (_EDGE + 16, y + 26), f"class {label}", 18)
    lines = (
        f"{of_group.cell_east[label]:,} E",
        f"{of_group.cell_north[label]:,} N",
        format_count(int(of_group.images[label]), "photo"),
    )
    for number, line in enumerate(lines):
        _write(pen, (_EDGE + 16, y + 62 + 20 * number), line, 14, _FAINT)


def _photos(index: GroupIndex, reader: ShardReader, label: int, count: int) -> list[_Shown]:
    """Photos evenly spread over a class."""
    first, last = int(index.starts[label]), int(index.starts[label + 1])
    shown = []
    for row in np.unique(np.linspace(first, last - 1, count).astype(np.int64)).tolist():
        try:
            photo = upright_rgb(open_photo(io.BytesIO(reader.read(index.group, row))))
        except OSError:
            shown.append(_Shown(None, ""))
        else:
            shown.append(_Shown(photo, _photo_caption(index, row)))
    return shown


def _photo_caption(index: GroupIndex, row: int) -> str:
    """Heading and time of a photo, as far as its table tells them."""
    table: Path = index.shards[index.shard[row]].with_suffix(".parquet")
    wanted = [("offset", "==", int(index.offset[row]))]
    facts = read_samples(table, ["heading", "timestamp"], wanted).to_pylist()
    if not facts:
        return ""
    heading, time = facts[0]["heading"], printable(facts[0]["timestamp"])
    time = re.sub(r"^(\d{4})(\d\d)$", r"\1-\2", time)
    time = re.sub(r"^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d).*$", r"\1 \2", time)
    degrees = f"{round(heading) % 360}°" if np.isfinite(heading) else ""
    return _shortened("   ".join(part for part in (degrees, time) if part), _TILE, _CAPTION)


def _shortened(text: str, pixels: int, size: int) -> str:
    """`text`, with an ellipsis for its end where it is wider than so many pixels."""
    font = ImageFont.load_default(size)
    kept = text[:pixels]
    while kept and font.getlength(kept + "…" * (kept != text)) > pixels:
        kept = kept[:-1]
    return kept + "…" * (kept != text)


def _title(dataset: Dataset) -> str:
    made = dataset.manifest
    name = printable((dataset.store.url if dataset.store else str(dataset.path.resolve())).rpartition("/")[2])
    counts = ((made.images, "image"), (made.classes, "class"), (made.groups, "group"))
    return f"{name[:40]}: {', '.join(format_count(count, noun) for count, noun in counts)}"


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, ink: Rgb = _INK, anchor: str = "la"
) -> None:
    pen.text(at, text, ink, ImageFont.load_default(size), anchor=anchor)
