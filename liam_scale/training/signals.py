"""Signals that ask a run to save and end."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SAVE, INTERRUPT = 1, 2
"""What a signal asks for: save and end well; save and end as Ctrl-C does. Ranks follow the largest wish."""


class StopRequest:
    """Whether this process was told to stop.

    Attributes
    ----------
    wish
        0, SAVE or INTERRUPT.
    """

    def __init__(self) -> None:
        self.wish = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 of a scheduler, SIGHUP of a closed terminal and Ctrl-C ask for a checkpoint and the end.

        A second Ctrl-C ends the process at once.
        """
        terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

        def note(number: int, frame: Any) -> None:
            self.wish = max(self.wish, INTERRUPT if number == signal.SIGINT else SAVE)
            _forget(terminals)

        before: dict[int, Any] = {}
        try:
            for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"):
                number = getattr(signal, name, None)
                # `nohup` and a shell's background jobs have signals ignored, and mean it.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, note)
        except ValueError:
            # Not the main thread (a notebook's worker, say): no handlers there.
            yield
            return
        try:
            with _second_interrupt_ends():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def interrupts_end_at_once() -> Iterator[None]:
    """Where there is nothing to save and the process waits for others: inside torch no handler of Python would run."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """A handler of Python waits until torch returns, which another rank may never let it; a thread is told at once."""
    told, tells = socket.socketpair()
    tells.setblocking(False)

    def watch() -> None:
        interrupts = 0
        while numbers := told.recv(64):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(128 + signal.SIGINT)

    watcher = threading.Thread(target=watch, name="interrupts", daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        tells.close()
        watcher.join()
        told.close()


def _forget(terminals: list[int]) -> None:
    """Writing to a terminal that is gone is an error, which must not stop the save."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, descriptor)
            os.close(sink)
