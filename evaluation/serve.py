"""A web page on this computer: drop a photo, see the places on a map with confidences and known photos nearby.

JPEG, PNG and WebP. Uploads stay in memory and are forgotten once answered. The page loads nothing from elsewhere.

python evaluation/serve.py --checkpoint RUN [--shards DIR]

Programs post a photo and get the fields of `predict.py --json`, or an HTTP error with {"error": "the reason in words"}:

curl --data-binary @photo.jpg "http://127.0.0.1:8000/locate?name=photo.jpg"
"""

from __future__ import annotations

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

import errno
import ipaddress
import math
import socket
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import tyro
from PIL import Image

from evaluation.answer_photos import Request
from evaluation.answer_queue import AnswerQueue
from evaluation.known_photos import KnownPhotos
from evaluation.localiser import Localiser, choose_device, load_localiser
from evaluation.uploads import Limits
from shards.console import JobError, check_arguments, entry, format_count, printable
from shards.sample_photos import SamplePhotos
from shards.workers import cores_of_process
from training.scoring import THRESHOLD_METRES

_DECODERS = 4


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    checkpoint: Path
    """Run (its best checkpoint is taken) or a single checkpoint folder."""
    shards: str | None = None
    """Data set (folder or URL) whose photos are shown beside the answers."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one, so that others can use the page (there is no password)."""
    port: int = 8000
    """Port to listen on; 0 for a free one."""
    names: tuple[str, ...] = ()
    """Host names of this server besides localhost and its own, as where a proxy publishes it."""
    top: int = 5
    """Places for each photo."""
    apart: float = THRESHOLD_METRES
    """Metres between the places of a photo; the confidence is the probability within this distance."""
    southern: bool = False
    """The city lies south of the equator (class maps of older data sets do not say so themselves)."""
    max_megabytes: float = 20.0
    """Largest file accepted, in millions of bytes."""
    max_megapixels: float = 50.0
    """Largest photo accepted, in millions of pixels; decoding one takes up to 8 MB a megapixel."""
    at_once: int = 32
    """Photos received and answered at a time; more are turned away (HTTP 503)."""
    cpu: bool = False
    """Compute on the CPU even where there is a GPU."""

    def __post_init__(self) -> None:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # beyond that Pillow itself refuses, before that it warns
        check_arguments(
            {
                "--top: at least 1": self.top < 1,
                "--apart: 0 metres or more, and finite": not 0 <= self.apart < math.inf,
                "--port: 0 to 65535": not 0 <= self.port <= 65535,
                "--max-megabytes: more than 0": not self.max_megabytes > 0,
                f"--max-megapixels: more than 0, at most {most // 10**6}": not 0 < self.max_megapixels * 1e6 <= most,
                "--at-once: at least 1": self.at_once < 1,
            }
        )


def main() -> None:
    """Load, listen, and answer until Ctrl-C."""
    arguments = tyro.cli(Arguments, description=__doc__)
    web = load_web()
    listener = listen(arguments.host, arguments.port)
    device = choose_device(cpu=arguments.cpu)
    localiser = load_localiser(arguments.checkpoint, device, southern=arguments.southern)
    known = None
    if arguments.shards is not None:
        known = KnownPhotos(SamplePhotos.open(arguments.shards), localiser.classes)
    threads = min(cores_of_process(), _DECODERS)
    request = Request(arguments.top, arguments.apart, threads=threads)
    limits = Limits(round(arguments.max_megabytes * 1e6), round(arguments.max_megapixels * 1e6))
    queue = AnswerQueue(localiser, request, limits, arguments.at_once)
    private = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    page = web.WebApp(queue, known, private=private)
    names = (socket.gethostname(), *arguments.names)
    server = web.PageServer(page, names, lambda: announce(arguments, listener, localiser, private))
    try:
        server.run(sockets=[listener])
    finally:
        queue.close()


def load_web() -> ModuleType:
    """The module `evaluation.web_app`; JobError says how to install what it needs."""
    try:
        return import_module("evaluation.web_app")
    except ImportError as error:
        raise JobError(f'{error.name} is not installed: pip install "divide-and-classify[serve]"') from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; JobError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        words = "; name another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else ""
        raise JobError(f"--host {printable(host)} --port {port}: {error.strerror or error}{words}") from error
    except UnicodeError as error:  # parts of a name that are empty or longer than 63 characters
        raise JobError(f"--host {printable(host)}: no name that a computer can have") from error


def announce(arguments: Arguments, listener: socket.socket, localiser: Localiser, private: bool) -> None:
    """One line with the address of the page; a warning where others can reach it."""
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    if not private:
        print(f"warning: --host {arguments.host}: whoever reaches this computer can use the page", file=sys.stderr)
    cells = format_count(len(localiser.classes), "cell")
    print(f"http://{shown}:{port}/  answers with {arguments.checkpoint} ({cells}); Ctrl-C ends it", flush=True)


if __name__ == "__main__":
    entry(main)
