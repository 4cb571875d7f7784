"""Being asked to stop: SIGTERM and SIGUSR1, as clusters send them before they take a machine away."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Within this context the signals only leave their name in `received`; the training loop looks at it."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> Interruption:
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
