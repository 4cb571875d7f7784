"""Being asked to stop: SIGTERM and SIGUSR1, as clusters send them before they take a machine away."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_MOMENT = 0.1  # seconds


class AskedToStop(BaseException):
    """A signal came while training waited."""


class Interruption:
    """Within this context the signals do not kill: before `begin` they end the process at once with exit code 0 and a
    line, since there is nothing to save yet; after it they leave their name in `received`, and end what the training
    loop waits for."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._begun = False
        self._waits = False

    def __enter__(self) -> Interruption:
        # A thread, since a handler waits for the main thread, which may wait in C for another machine to join.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        os.close(signal.set_wakeup_fd(self._previous_fd))  # the thread ends with its pipe

    def begin(self) -> None:
        """From now on there is something to save: signals are left to the training loop."""
        self._begun = True

    @contextmanager
    def ends_wait(self) -> Iterator[None]:
        """Within this block a signal, also one received earlier, raises `AskedToStop`: for waits without an end."""
        self._waits = True
        try:
            if self.received is not None:
                raise AskedToStop
            yield
        finally:
            self._waits = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if self._waits:
            self._waits = False  # the next signal does not disturb what closes the block
            raise AskedToStop

    def _watch(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            asked = [number for number in numbers if number in SIGNALS]
            if asked and not self._begun:
                if os.environ.get("RANK", "0") == "0":
                    name = signal.Signals(asked[0]).name
                    os.write(1, f"stopped by {name} before the first step: nothing to save\n".encode())
                os._exit(0)
            if asked:
                time.sleep(_MOMENT)
            while asked and self._waits:
                os.kill(os.getpid(), asked[0])  # the main thread, which began to wait just as it came, has not seen it
                time.sleep(_MOMENT)
        os.close(reader)
