"""Who an output folder belongs to: the plan that began it, and which of several machines is at work on the plan."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from preprocessing.plan import Plan, Settings
from preprocessing.sources import Source
from shards.console import JobError
from shards.dataset import GPU_CODEC
from shards.files import atomic_write_json, is_partial, read_bytes
from shards.layout import LISTING, MANIFEST, PLAN, PROVENANCE
from shards.locks import LOCK, try_lock
from shards.provenance import provenance

_PLACES = ("source", "root")


def check_output(source: Source, out: Path) -> None:
    """Raise `JobError` where `out` is no folder for a data set."""
    if out.exists() and not out.is_dir():
        raise JobError(f"{out}: is a file; --out takes a folder")
    source.check(out)
    ours = any((out / name).exists() for name in (MANIFEST, PLAN, LISTING, LOCK))
    if out.is_dir() and not ours and not all(is_partial(path.name) for path in out.iterdir()):
        raise JobError(f"{out}: not empty and not a data set; choose an empty or new folder")


def claim(out: Path, source: Source, plan: Plan) -> None:
    """Mark `out` as this plan's; raises `JobError` where it holds another data set."""
    facts = {"fingerprint": plan.fingerprint, **plan.settings.facts()}
    absolute = source.resolved()
    facts |= {"source": absolute.place, "root": absolute.root if source.is_list else None}
    before = _read(out)
    if before is not None:
        _check_same(before, facts, out)
    if before is None or any(before.get(name) != facts[name] for name in _PLACES):
        atomic_write_json(out / PLAN, facts)
    if not (out / PROVENANCE).exists():  # a kill may have come between the two
        atomic_write_json(out / PROVENANCE, provenance())


def _check_same(before: dict[str, Any], facts: dict[str, Any], out: Path) -> None:
    if before.get("fingerprint") == facts["fingerprint"]:
        return
    differing = [k for k, v in facts.items() if before.get(k) != v and k not in (*_PLACES, "fingerprint")]
    if differing == ["codec"]:
        raise JobError(
            f"{out}: was made with {before.get('codec')}, and here is {facts['codec']}; install those versions, or "
            "choose another --out"
        )
    what = "; ".join(f"{k} was {before.get(k)}, is {facts[k]}" for k in differing) or "the list of photos changed"
    raise JobError(f"{out}: holds another data set ({what}); choose another --out or delete that folder")


class Claim(NamedTuple):
    """What `plan.json` says of a data set: its first source, its settings, the name of the codec that began it, and its
    fingerprint."""

    source: Source
    settings: Settings
    codec: str
    fingerprint: str


def claimed(out: Path) -> Claim:
    """Who has claimed `out`, a data set's folder; raises `JobError`."""
    facts = _read(out)
    again = "run the command that made the data set once more, with --source"
    if facts is None:
        raise JobError(f"{out / PLAN}: missing; {again}")
    try:
        settings = Settings(**{name: facts[name] for name in Settings.__dataclass_fields__})
        settings = replace(settings, codec="gpu" if facts["codec"].startswith(GPU_CODEC) else "cpu")
        source = Source.of(facts["source"], facts["root"], settings.crops)
        return Claim(source, settings, facts["codec"], facts["fingerprint"])
    except KeyError as error:
        raise JobError(f"{out / PLAN}: {error.args[0]!r} is missing; {again}") from None
    except (AttributeError, TypeError) as error:
        raise _damaged(out, error) from None


def _read(out: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(read_bytes(out / PLAN))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(out, error) from None
    if not isinstance(facts, dict):
        raise _damaged(out, ValueError("no JSON object"))
    return facts


def _damaged(out: Path, error: Exception) -> JobError:
    return JobError(f"{out / PLAN}: damaged ({error}); run shards/verify.py --repair")


@dataclass(frozen=True)
class TaskLock:
    """The lock of one of several tasks that are at work on a folder, maybe on several machines. Its bytes are locked
    one by one: the first by the task that lists the photos, the others by number.

    The kernel, or the server of a network file system, frees a lock when its holder dies. On a file system without
    locks nobody waits and nobody is kept out.
    """

    file: TextIO

    @staticmethod
    @contextmanager
    def of(out: Path, index: int, count: int) -> Iterator["TaskLock"]:
        """Hold the lock of task `index` of `count`; raises `JobError` where another process has it."""
        with open(out / LOCK, "a") as file:
            if try_lock(file, 1 + index) is False:
                raise JobError(f"{out}: task {index} of {count} is at work already; wait for that process, or stop it")
            yield TaskLock(file)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Let one task after the other into the block."""
        if try_lock(self.file, 0) is False:
            print("waiting for another task that lists the photos", flush=True)
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            with suppress(OSError):  # there was no lock
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, 0)


def unlock(out: Path) -> None:
    """Take the lock's file away, when no machine is at work on `out` any more."""
    (out / LOCK).unlink(missing_ok=True)
