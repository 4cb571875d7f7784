"""Photos that strangers send: read within bounds, judged by their header, decoded in memory, never written to disk."""

from __future__ import annotations

import io
from collections.abc import AsyncIterable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import PurePosixPath

from shards.console import one_line
from shards.upright import UnreadablePhoto, open_photo

FORMATS = ("JPEG", "PNG", "WEBP")

_ASPECT = 10  # the shorter side has a fixed size for the model: a strip of one pixel's width would fill the memory
_SCANS = 100
_NAME_LENGTH = 255


class Refused(Exception):
    """A request that is not answered: the HTTP status, and the reason in words for a person."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """What an upload may be: bytes of the file, pixels of the photo."""

    bytes: int
    pixels: int


async def read_body(chunks: AsyncIterable[bytes], declared: str | None, limits: Limits) -> bytes:
    """The body of a request; refused as soon as its declared or its real length passes the limit."""
    too_large = Refused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The file is larger than the {limits.bytes / 1e6:g} MB that are accepted."
    )
    if declared is not None and declared.isdecimal() and int(declared) > limits.bytes:
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limits.bytes:
            raise too_large
    return bytes(body)


def check_photo(content: bytes, limits: Limits) -> None:
    """Refuse what is no photo of an accepted format or has too many pixels, by its header, before it is decoded."""
    if not content:
        raise Refused(HTTPStatus.BAD_REQUEST, "The file is empty.")
    try:
        with open_photo(io.BytesIO(content), FORMATS) as image:
            width, height = image.size
    except UnreadablePhoto as error:
        raise unreadable(error, limits) from error
    if width * height > limits.pixels:
        raise Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The photo has {width:,} x {height:,} pixels, more than {_megapixels(limits)}.",
        )
    if max(width, height) > _ASPECT * min(width, height):
        raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, f"The photo is more than {_ASPECT} times as long as it is wide.")
    # A progressive JPEG passes over all its pixels once a scan; ten scans are usual, thousands fit into a megabyte.
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > _SCANS:
        raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, f"The photo is coded in more than {_SCANS} scans.")


def unreadable(error: UnreadablePhoto, limits: Limits) -> Refused:
    """The refusal of a photo that cannot be decoded."""
    if error.reason == "not an image":
        return Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"This is {error}.")
    if error.reason == "too large":
        return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The photo has more pixels than {_megapixels(limits)}.")
    return Refused(HTTPStatus.UNPROCESSABLE_ENTITY, f"The photo is damaged and cannot be read ({one_line(error)}).")


def base_name(name: str) -> str:
    """The last part of a name from outside; "photo" where it has none."""
    return PurePosixPath(name.replace("\\", "/")).name[-_NAME_LENGTH:] or "photo"


def _megapixels(limits: Limits) -> str:
    return f"the {limits.pixels / 1e6:g} megapixels that are accepted"
