"""Where things lie in a data set, and the tables' columns: shard format version 1.

<dataset>/dataset.json                      manifest, written last: it says "complete"
<dataset>/plan.json                         settings, source and fingerprint, written first
<dataset>/provenance.json                   versions, command and commit that began it
<dataset>/classes.parquet                   `shards.classes.ClassTable`
<dataset>/group-GG/group-GG-NNNNNN.tar      WebDataset tar: KEY.jpg, KEY.cls
<dataset>/group-GG/group-GG-NNNNNN.idx      DALI index of the tar
<dataset>/group-GG/group-GG-NNNNNN.parquet  sample table, normative, and the marker that the shard is done
<dataset>/index/                            flat arrays derived from the sample tables
<dataset>/skipped.parquet                   photos of cells with too few photos
<dataset>/quarantine.jsonl                  photos that are bad, and why
<dataset>/checksums.txt                     `shards.checksums`
<dataset>/revisions/                        what later additions and retries brought
<dataset>/listing.parquet                   cached list of the source's photos; may be deleted
"""

import re
from pathlib import Path

import pyarrow as pa

FORMAT_VERSION = 1
SHARD_SAMPLES = 8192

MANIFEST = "dataset.json"
PLAN = "plan.json"
CLASSES = "classes.parquet"
SKIPPED = "skipped.parquet"
QUARANTINE = "quarantine.jsonl"
PROVENANCE = "provenance.json"
INDEX = "index"
REVISIONS = "revisions"
REVISION_FILES = ("-classes.parquet", "-skipped.parquet", "-bad.jsonl", ".parquet")
"""What follows a revision's number in the names of its files, in the order of writing."""

LISTING = "listing.parquet"
CHECKSUMS = "checksums.txt"

TOP_FILES = (MANIFEST, PLAN, CLASSES, SKIPPED, QUARANTINE, PROVENANCE)
"""The files above the shards that every finished data set has."""

OPTIONAL_TOP_FILES = (LISTING, CHECKSUMS)
"""Those that it may have."""

SAMPLE_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("east", pa.float64()),
        ("north", pa.float64()),
        ("heading", pa.float32()),
        ("timestamp", pa.string()),
        ("source", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int32()),
        ("crc32", pa.uint32()),
    ]
)

SHARD_KINDS = ("tar", "idx", "parquet")
"""The extensions of a shard's files, in the order of writing."""

SHARD_STEM = r"group-(?P<group>\d{2,})/group-(?P=group)-\d{6,}"
"""What `shard_stem` gives, as a regular expression."""

_TABLE = re.compile(rf"{SHARD_STEM}\.parquet")


def group_name(group: int) -> str:
    """Name of a group's folder."""
    return f"group-{group:02d}"


def shard_stem(group: int, number: int) -> str:
    """A shard's path below the data set, without an extension."""
    return f"{group_name(group)}/{group_name(group)}-{number:06d}"


def shard_numbers(stem: str) -> tuple[int, int]:
    """Group and number of a shard by its stem, with or without the folder: the inverse of `shard_stem`."""
    _, group, number = stem.rpartition("/")[2].split("-")
    return int(group), int(number)


def sample_key(index: int) -> str:
    """Key of the planned sample `index` of a group; no dots, since WebDataset cuts a key at the first."""
    return f"{index:09d}"


def shard_tables(dataset: Path) -> list[Path]:
    """The sample tables of all finished shards in order of their paths, so that a group's are in order of number."""
    found = dataset.glob("group-*/group-*.parquet")
    return sorted(path for path in found if _TABLE.fullmatch(f"{path.parent.name}/{path.name}"))
