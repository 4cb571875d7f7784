"""Numbers with units and nouns, as a person reads them, and how a process ends."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shards.console import describe_os_error, entry, format_bytes, format_count, format_duration, quit_on_ctrl_c

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [(41200000, "", "41,200,000"), (1, "class", "1 class"), (0, "class", "0 classes"), (3400, "query", "3,400 queries"),
     (2, "process", "2 processes"), (1000, "shard", "1,000 shards")],
)  # fmt: skip
def test_counts_bear_their_noun_in_the_right_number(count: int, noun: str, words: str) -> None:
    assert format_count(count, noun) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.5, "1 min 0 s"), (3599.4, "59 min 59 s"),
     (3599.6, "1 h 0 min"), (26000, "7 h 13 min")],
)  # fmt: skip
def test_durations_are_rounded_once(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (66.6e6, "66.6 MB"), (2.5e15, "2500.0 TB")]
)
def test_bytes_have_decimal_units(count: float, words: str) -> None:
    assert format_bytes(count) == words


THREADS_IN_TORCH = """
import atexit, threading, torch
from shards.console import JobError, entry
from training.one_voice import ended_at_once

def work():
    a = torch.randn(100)
    while True:
        a + a

def main():
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    atexit.register(print, "handlers ran")
    print("told", end=" ")
    raise JobError("nothing to train on")

with ended_at_once():
    entry(main)
"""


def test_threads_inside_torch_do_not_abort_a_process_that_ends() -> None:
    command = [sys.executable, "-c", THREADS_IN_TORCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "told handlers ran\n", "error: nothing to train on\n")


def test_ctrl_c_that_a_shell_has_ignored_for_a_background_job_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        quit_on_ctrl_c()
        with pytest.raises(SystemExit, match="0"):
            entry(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)


def test_memory_that_does_not_suffice_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        entry(lambda: np.zeros(1 << 60, np.uint8).sum())
    assert re.fullmatch(r"error: not enough memory \(Unable to allocate .*\)\n", capsys.readouterr().err)


def test_a_name_that_is_not_utf8_is_one_line_but_for_that_of_a_photo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["build.py", "--source", os.fsdecode(b"caf\xe9")])
    with pytest.raises(SystemExit, match="2"):
        entry(lambda: print("ran"))
    assert capsys.readouterr() == ("", "error: caf\\udce9: is not UTF-8; rename the file or folder\n")
    with pytest.raises(SystemExit, match="0"):
        entry(lambda: print("ran"), names_photos=True)
    assert capsys.readouterr().out == "ran\n"


@pytest.mark.parametrize(("allowed", "advised"), [(256, 1024), (1024, 4096)])
def test_of_too_many_open_files_the_way_out_is_more_than_there_may_be_now(monkeypatch, allowed, advised):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, 1 << 20))
    said = describe_os_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert said == f"Too many open files; allow this process more of them (ulimit -n {advised})"
