"""Signals that ask a run to save and end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """Whether this process was told to stop."""

    def __init__(self) -> None:
        self.is_made = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 ask for a checkpoint and a clean end: schedulers send them before a time limit."""

        def note(number: int, frame: Any) -> None:
            self.is_made = True

        try:
            before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGUSR1)}
        except ValueError:
            # Not the main thread (a notebook's worker, say): no handlers there.
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
