"""Files of our HTML pages, and data in the form that their scripts read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from evaluation.result_files import without_nan
from shards.classes import ClassTable


@dataclass(frozen=True)
class Page:
    """The parts of a page as text."""

    html: str
    css: str
    js: str


def read_page(name: str) -> Page:
    """The page in the folder `name`_page; its style and script follow those that all pages share."""
    own, shared = (files("evaluation").joinpath(folder) for folder in (f"{name}_page", "page_parts"))
    html, css, js = (own.joinpath(f"{name}.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    base, city_map = (shared.joinpath(part).read_text("utf-8") for part in ("base.css", "map.js"))
    return Page(html, base + css, city_map + js)


def to_script(value: Any) -> str:
    """JSON that can stand inside a <script> element, whatever names from outside it holds."""
    text = json.dumps(without_nan(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def map_corner(classes: ClassTable) -> tuple[int, int]:
    """Easting and northing (metres) that a page's map counts from: short numbers, exact in its floats."""
    return int(classes.cell_east.min()), int(classes.cell_north.min())


def map_cells(classes: ClassTable, corner: tuple[int, int]) -> dict[str, Any]:
    """Cells by their column and row from the corner (fractions where the corner is another map's)."""
    return {
        "M": classes.M,
        "east": _short((classes.cell_east - corner[0]) / classes.M),
        "north": _short((classes.cell_north - corner[1]) / classes.M),
        "group": classes.group.tolist(),
    }


def _short(values: np.ndarray) -> list[float]:
    return [int(v) if v == int(v) else round(v, 4) for v in values.tolist()]
