"""What a person sees: one-line errors, exit codes, and numbers with units."""

import errno
import io
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

NO_THREAD = "no further thread can be started; allow more processes or memory (ulimit -u, ulimit -v, of a container)"


class JobError(Exception):
    """A job cannot go on. The message is one line that names the file or field and the way out."""


class WrongArguments(JobError):
    """The command line asks for something that cannot be; the exit code is 2."""


def check_arguments(wrong: dict[str, bool]) -> None:
    """Raise `WrongArguments` with the first message, which names the flag and what is right, whose condition holds."""
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise WrongArguments(message)


def check_ranges(arguments: object, **ranges: tuple[float, float]) -> None:
    """Raise `WrongArguments` for the first of these fields that lies outside its range; None lies in any."""
    for name, (low, high) in ranges.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise WrongArguments(f"{flag_of(name)} must be from {low} to {high}")


def flag_of(name: str) -> str:
    """The flag of a field: `--batch-size` of `batch_size`."""
    return f"--{name.replace('_', '-')}"


def exit_code(error: JobError) -> int:
    """What a program that `error` stops exits with."""
    return 2 if isinstance(error, WrongArguments) else 1


def quit_on_ctrl_c() -> None:
    """From here to `entry`, Ctrl-C ends the process with exit code 130 and nothing else: an entry point's first act,
    since the imports of some packages take seconds, and an exception in them is a traceback or gets lost."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a shell's background job
        signal.signal(signal.SIGINT, _quit)


def _quit(number: int, frame: FrameType | None) -> None:
    os._exit(130)


def entry(main: Callable[[], int | None], *, names_photos: bool = False) -> NoReturn:
    """Run an entry point and exit: 0 on success, 1 on a failed job, 2 on wrong arguments, 130 on Ctrl-C.

    Names on the command line must be UTF-8, which the tables, and the libraries that write them, take alone; those of
    photos (`names_photos`) may be any bytes.
    Errors of the operating system that no caller turned into a `JobError` (a full disk, a folder
    without permission) are printed as one line that names the file, and so is memory that does not suffice.
    """
    _ready_streams()
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if module := sys.modules["__main__"].__spec__:  # so that --help names what was typed, not a file in site-packages
        sys.argv[0] = f"python -m {module.name}"
    try:
        if not names_photos:
            _check_words(sys.argv[1:])
        code = main() or 0
    except JobError as error:
        code = _fail(str(error), exit_code(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except RuntimeError as error:
        if not lacks_thread(error):
            raise
        code = _fail(NO_THREAD)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if not is_systems(error):
            raise
        code = _fail(describe_os_error(error))
    except MemoryError as error:
        code = _fail(f"not enough memory ({one_line(error)})")
    if sys.stdout:  # None where it was closed from the start
        sys.stdout.flush()
    sys.exit(code)


def _ready_streams() -> None:
    """Let output have any character, whatever the terminal shows. Where a standard stream is closed from the start, let
    no file that is opened later take its number, and bars go nowhere."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _check_words(words: list[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise WrongArguments(f"{printable(word)}: is not UTF-8; rename the file or folder") from None


def describe_os_error(error: OSError) -> str:
    """One line for an `OSError`: the file, what happened, and the way out where there is one."""
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    what = error.strerror or str(error)
    if error.filename and error.errno and "[errno " in what:  # pyarrow's, which tells how it was reading
        what = os.strerror(error.errno)
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = {
        errno.ENOSPC: "; free some space and run the same command again",
        errno.EDQUOT: "; free some space and run the same command again",
        errno.EEXIST: ", but a folder is needed there",  # what making a folder says of a file
        errno.EACCES: "; check the permissions",
        errno.EROFS: "; choose a folder that can be written to",
        errno.EAGAIN: "; allow more processes (ulimit -u, of a container), or use fewer --workers",
        errno.EMFILE: f"; allow this process more of them (ulimit -n {4 * open_files})",
    }.get(error.errno or 0, "")
    return f"{where}{what}{advice}"


def in_words(error: JobError | OSError) -> str:
    """One line for either: the message of a job, or `describe_os_error`."""
    return describe_os_error(error) if isinstance(error, OSError) else str(error)


def lacks_thread(error: BaseException | None) -> bool:
    """Whether an error is, or tells of, Python's own where it can start no further thread."""
    return "can't start new thread" in str(error)


def is_systems(error: BaseException) -> bool:
    """Whether an error is the operating system's own (permissions, a full disk): pyarrow says of many a damaged file
    that it is an `OSError` too, of no number."""
    return isinstance(error, OSError) and error.errno is not None


def one_line(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return describe_os_error(OSError(error.errno, error.strerror))
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error that says more than a person wants to read."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """The last line of an error: where torch's of weights that do not fit name what does not."""
    return _lines(error)[-1].strip()


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


def progress_bar(title: str | None, total: int, noun: str) -> Any:
    """A bar of `total` things on stderr, from the fifth second on; None for a title: no bar."""
    from tqdm import tqdm  # 40 ms, for which `quit_on_ctrl_c` would wait

    return tqdm(desc=title, total=total, unit=f" {noun}", unit_scale=True, delay=5, disable=title is None)


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """`text` on one line with control characters and undecodable bytes escaped (names come from outside)."""
    escaped = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def format_bytes(count: float) -> str:
    """Bytes with a decimal unit: `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def format_duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 5 s` or `7 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_count(count: int, noun: str = "") -> str:
    """An integer with thousands separators, and of what: `41,200,000`, `1 class`, `3,400 classes`."""
    if not noun:
        return f"{count:,}"
    if count == 1:
        return f"1 {noun}"
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("ss") else f"{noun}s"
    return f"{count:,} {many}"
