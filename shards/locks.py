"""Locks between processes, of one machine or of several that share a file system.

The kernel, or the server of a network file system, frees a lock when its holder dies. NFS locks files that are open
for writing, and no folders. On a file system without locks nobody waits and nobody is kept out.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from shards.console import JobError

LOCK = ".lock"
"""The file in a folder that is locked by those at work on it, where folders cannot be locked, or who share the work."""


@contextmanager
def at_work(out: Path, *, beside_others: bool = False) -> Iterator[None]:
    """Hold the folder `out` for one command, or for one of several tasks of a plan (`beside_others`).

    Raises `JobError` where another command holds it. On NFS the lock is on a file in the folder, of which every task
    locks a byte.
    """
    descriptor = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    held = JobError(f"{out}: another command is at work on it; wait for that one, or stop it")
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if beside_others else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise held from None
        except OSError:  # EBADF of NFS; ENOLCK, ENOSYS
            if not beside_others:
                with open(out / LOCK, "a") as file:
                    if try_lock(file) is False:
                        raise held from None
                    yield
                return
        yield
    finally:
        os.close(descriptor)


def try_lock(file: TextIO, byte: int | None = None) -> bool | None:
    """Lock a byte of a file that is open for writing, or all of it, without waiting: True where it is locked now, False
    where another process has it, None on a file system without locks.

    A child that outlives the process does not keep this form of lock.
    """
    length, start = (0, 0) if byte is None else (1, byte)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP
        return None
    return True


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Wait until nobody else, of this process or another, is in such a block for the file or folder `path`, which must
    exist. Yields whether it is locked: not where that is impossible, and without `wait` not where somebody has it.
    """
    writing = os.O_RDWR if path.is_file() and os.access(path, os.W_OK) else os.O_RDONLY
    descriptor = os.open(path, writing | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:  # EWOULDBLOCK; EBADF, ENOLCK, ENOSYS
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def folder_locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """`locked` for a folder, by a file in it, which NFS locks too; by the folder itself where no file can be made."""
    path = folder / LOCK
    with suppress(OSError):  # a read-only disk, another user's folder
        path.touch()
    with locked(path if path.exists() else folder, wait=wait) as held:
        yield held
