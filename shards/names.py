"""Photo names: where and when a photo was taken, written in its file name as in SF-XL.

`@ east @ north @ zone @ band @ latitude @ longitude @ pano @ tile @ heading @ pitch @ roll @ height @ timestamp
@ note @ .jpg`

Eastings and northings are UTM metres, latitude and longitude degrees, the heading degrees clockwise from
north. Only the base name is read, so an `@` in a folder's name does no harm.
"""

import os
import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

PHOTO_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
"""What the names of files that are taken for photos end in, in any case."""

_BAND = re.compile("[C-HJ-NP-X]")
_NUMBER = re.compile(r"[+-]?\d{1,12}(\.\d*)?")
_CHUNK = 1 << 14


class BadName(ValueError):
    """A photo's name has no usable coordinates; the message says what is missing."""


class PhotoName(NamedTuple):
    """The fields of a photo's name; metres and degrees; None or "" where the name leaves a field out."""

    east: float
    north: float
    zone: int | None = None
    band: str = ""
    latitude: float | None = None
    longitude: float | None = None
    pano: str = ""
    tile: str = ""
    heading: float | None = None
    timestamp: str = ""
    extension: str = ".jpg"


def parse_name(path: str) -> PhotoName:
    """Read the fields of a photo's name (any path; only its base name counts).

    Raises `BadName` where easting and northing are missing or no plain decimal numbers.
    """
    stem, extension = os.path.splitext(os.path.basename(path))
    fields = stem.split("@")
    if len(fields) < 3:
        raise BadName("no coordinates in the name (expected @EAST@NORTH@...)")
    east, north = (_number(field) for field in fields[1:3])
    if east is None or north is None:
        raise BadName(f"the coordinates {fields[1]!r}, {fields[2]!r} in the name are no plain decimal numbers")
    fields += [""] * (15 - len(fields))
    zone = int(fields[3]) if re.fullmatch(r"[1-9]|[0-6]\d", fields[3]) else 0
    if not (1 <= zone <= 60 and _BAND.fullmatch(fields[4])):  # the minimal form: no agreed meaning after these
        return PhotoName(east, north, extension=extension)
    timestamp = fields[13]
    if not timestamp and re.fullmatch(r"\d{6}", fields[8]) and not any(fields[9:]):
        timestamp = fields[8]  # the older, shorter names end in the month
    return PhotoName(
        east, north, zone, fields[4],
        _number(fields[5]), _number(fields[6]), fields[7], fields[8], _number(fields[9]), timestamp, extension,
    )  # fmt: skip


def format_name(name: PhotoName) -> str:
    """The SF-XL form of a name, zero-padded as there."""
    fields = [
        f"{name.east:010.2f}",
        f"{name.north:010.2f}",
        "" if name.zone is None else str(name.zone),
        name.band,
        "" if name.latitude is None else f"{name.latitude:09.5f}",
        "" if name.longitude is None else f"{name.longitude:010.5f}",
        name.pano, name.tile,
        "" if name.heading is None else f"{name.heading:g}",
        "", "", "", name.timestamp, "", name.extension,
    ]  # fmt: skip
    return "@" + "@".join(fields)


def parse_utm(paths: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates of many photos at once; the same values as `parse_name`, some 20 times as fast.

    `paths`: `large_string` or `large_binary` array [n]. Returns east float64 [n], north float64 [n] (NaN where
    `parse_name` raises `BadName`), zone int8 [n] (0 where the name has none), and whether its band lies south of the
    equator, bool [n] (False where it has none).
    """
    n = len(paths)
    east, north, zone, southern = np.empty(n), np.empty(n), np.empty(n, np.int8), np.empty(n, bool)
    for first in range(0, n, _CHUNK):
        part = slice(first, min(first + _CHUNK, n))
        text, starts, ends = _text(paths.slice(first, _CHUNK))
        base = _base_starts(text, starts, ends)
        dotted = (text[ends - 4] == ord(".")) | (text[ends - 5] == ord("."))  # .jpg or .jpeg, not a number
        if dotted.all() and (full := _full_form(text, base, ends)) is not None:
            east[part], north[part], zone[part], southern[part] = full
            continue
        at = np.append(np.flatnonzero(text == ord("@")), [len(text)] * 5)
        k = np.searchsorted(at, base)
        a, b, c, d, e = (at[k + i] for i in range(5))
        dots = np.append(np.flatnonzero(text == ord(".")), len(text))
        east[part], east_ok = _decimals(text, dots, a + 1, b)
        north[part], north_ok = _decimals(text, dots, b + 1, c)
        zone[part], zone_ok = _two_digits(text, c + 1, d)
        band = text[np.minimum(d + 1, len(text) - 1)]
        southern[part] = band < ord("N")
        slow = ~(east_ok & north_ok & zone_ok & (e - d == 2) & dotted & (e < ends - 5) & _IS_BAND[band])
        for i in np.flatnonzero(slow):
            try:
                name = parse_name(bytes(text[starts[i] : ends[i]]).decode("utf-8", "replace"))
            except BadName:
                name = PhotoName(np.nan, np.nan)
            east[first + i], north[first + i], zone[first + i] = name.east, name.north, name.zone or 0
            southern[first + i] = "" < name.band < "N"
    return east, north, zone, southern


def string_bytes(texts: pa.Array) -> tuple[np.ndarray, Any]:
    """Where the n strings of an array (`large_string` or `large_binary`) lie in its bytes, and these (None: it has
    none): string i is what stands from number i to number i + 1, int64 [n + 1]."""
    _, offsets, data = texts.buffers()
    return np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1], data


def hash_names(paths: pa.Array) -> np.ndarray:
    """A 64-bit hash of every base name, uint64 [n]: equal names have equal hashes."""
    return names_and_keys(paths)[0]


def names_and_keys(paths: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """`hash_names`, and numbers to order names at random by, uint64 [n] both.

    The latter depend on the names around too where these differ in length. Data sets have their photos in this order.
    """
    names = np.empty(len(paths), np.uint64)
    keys = names
    for first in range(0, len(paths), _CHUNK):
        text, starts, ends = _text(paths.slice(first, _CHUNK))
        base = _base_starts(text, starts, ends)
        words = _words(text)
        lengths = ends - base
        h = lengths.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        own = h  # until the first names end
        shortest = int(lengths.min())
        for offset in range(0, int(lengths.max()), 8):
            if offset + 8 <= shortest:
                word = words[base + offset]
            else:
                word = words[base + np.minimum(offset, lengths)]
                word &= _KEEP_FIRST[np.clip(lengths - offset, 0, 8)]
            if own is h and offset >= shortest:
                own = h.copy()
            h ^= word
            h *= np.uint64(0xD6E8FEB86659FD93)
            h ^= h >> np.uint64(32)
            if own is not h:
                own = np.where(offset < lengths, h, own)
        names[first : first + len(h)] = own
        if own is not h and keys is names:
            keys = names.copy()
        if keys is not names:
            keys[first : first + len(h)] = h
    return names, keys


def _number(field: str) -> float | None:
    return float(field) if _NUMBER.fullmatch(field) else None


# Below: names as one byte buffer. Eight characters at any position are one unaligned 64-bit word, and eight
# digits become a number in three multiplications (https://lemire.me/blog/2022/01/21/swar-explained-parsing-eight-digits/).
# A field that does not fit (a sign, nine digits before the point) goes through `parse_name`.

_KEEP_FIRST = np.array([(1 << 8 * k) - 1 for k in range(9)], np.uint64)
_IS_BAND = np.array([_BAND.fullmatch(chr(c)) is not None for c in range(256)])
_POWERS = 10.0 ** np.arange(9)


def _text(paths: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of all names in a row (eight zero bytes before and after), and where each begins and ends."""
    ends, data = string_bytes(paths)
    raw = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if data else np.empty(0, np.uint8)
    text = np.zeros(len(raw) + 16, np.uint8)
    text[8:-8] = raw
    ends = ends - ends[0] + 8
    return text, ends[:-1], ends[1:]


def _base_starts(text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    slashes = np.flatnonzero(text == ord("/"))
    if not len(slashes):
        return starts
    last = slashes[np.maximum(np.searchsorted(slashes, ends) - 1, 0)]
    return np.where((last >= starts) & (last < ends), last + 1, starts)


def _words(text: np.ndarray) -> np.ndarray:
    return np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))


def _full_form(
    text: np.ndarray, base: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """East, north, zone and whether the band is a southern one where all names begin as SF-XL's do,
    `@0543256.96@4178906.70@10@S@`, and go on for five bytes and more; else None."""
    if (ends - base < 33).any():
        return None
    words = _words(text)
    at_east, at_point, at_north, at_rest = (words[base + k] for k in (0, 8, 11, 19))
    marks = (at_east & _byte(0) == _byte(0, "@")) & (at_north & _byte(0) == _byte(0, "@"))
    marks &= at_point & (_byte(0) | _byte(3)) == _byte(0, ".") | _byte(3, "@")
    marks &= at_rest & (_byte(0) | _byte(3) | _byte(6)) == _byte(0, ".") | _byte(3, "@") | _byte(6, "@")
    band = at_rest >> np.uint64(56)
    marks &= _IS_BAND[band] & (text[base + 27] == ord("@"))
    if not marks.all():
        return None
    numbers = [_eight_digits(word, 7) for word in (at_east, at_north)]
    numbers += [
        _eight_digits(word << np.uint64(8 * (8 - end)), 2) for word, end in ((at_point, 3), (at_rest, 3), (at_rest, 6))
    ]
    (east, north, east_cents, north_cents, zone), plain = zip(*numbers, strict=True)
    if not (np.all(plain) and zone.min() >= 1 and zone.max() <= 60):
        return None
    return (east * 100 + east_cents) / 100, (north * 100 + north_cents) / 100, zone, band < ord("N")


def _byte(place: int, character: str = "\xff") -> np.uint64:
    """A character at this place of eight, as part of their word."""
    return np.uint64(ord(character) << 8 * place)


def _decimals(
    text: np.ndarray, dots: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in text[begins:ends] as float64, and whether each was plain: 1-8 digits, a point, 0-7 digits."""
    dot = np.minimum(dots[np.searchsorted(dots, np.minimum(begins, len(text)))], ends)
    whole_digits = dot - begins
    decimals = np.maximum(ends - dot - 1, 0)
    plain = (whole_digits >= 1) & (whole_digits <= 8) & (decimals <= 7) & (ends < len(text) - 8)
    dot = np.where(plain, dot, 8)
    words = _words(text)
    whole, whole_ok = _eight_digits(words[dot - 8], np.clip(whole_digits, 0, 8))
    shift = (8 - np.clip(decimals, 0, 8)).astype(np.uint64) * np.uint64(8)
    after = np.where(decimals > 0, words[np.minimum(dot + 1, len(words) - 1)] << np.minimum(shift, np.uint64(56)), 0)
    fraction, fraction_ok = _eight_digits(after.astype(np.uint64), np.clip(decimals, 0, 8))
    power = _POWERS[np.clip(decimals, 0, 8)]
    return (whole * power + fraction) / power, plain & whole_ok & fraction_ok


def _two_digits(text: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    last = len(text) - 1
    tens, ones = text[np.minimum(begins, last)] - 48, text[np.minimum(begins + 1, last)] - 48
    value = tens * 10 + ones
    return value, (ends - begins == 2) & (tens < 7) & (ones < 10) & (value >= 1) & (value <= 60)


def _eight_digits(words: np.ndarray, digits: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """The last `digits` of each word's eight characters as a number, and whether all of them are digits."""
    keep = ~_KEEP_FIRST[8 - digits]
    value = (words ^ np.uint64(0x3030303030303030)) & keep
    over = (value + np.uint64(0x7676767676767676)) | value
    ok = (over & np.uint64(0x8080808080808080)) == 0
    value = value * np.uint64(10) + (value >> np.uint64(8))
    value = (
        (value & np.uint64(0x000000FF000000FF)) * np.uint64(0x000F424000000064)
        + ((value >> np.uint64(16)) & np.uint64(0x000000FF000000FF)) * np.uint64(0x0000271000000001)
    ) >> np.uint64(32)
    return value.astype(np.float64), ok
