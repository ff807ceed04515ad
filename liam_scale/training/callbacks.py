"""Callbacks: a training tells when it starts, what each evaluation found, and how it ended, for loggers of others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liam_scale.training.history import Row

logger = logging.getLogger(__name__)


class Callback:
    """What follows a training; a subclass overrides the events that it wants.

    Events come from the main rank alone, once for each model that is trained (a late integration trains one for each
    modality), and not from a run that has ended already. An error of `started` stops training before its first step;
    after an error of another event a warning says so, the callback hears no more, and the training goes on.
    """

    def started(self, folder: Path, step: int, options: dict[str, Any]) -> None:
        """Training begins, or goes on after `step` steps, in the folder of the run.

        `options` are the effective ones, by the names of the command line without dashes: `options["model.alpha"]`.
        """

    def evaluated(self, row: dict[str, float]) -> None:
        """A row was added to the history, under the names of its columns: `row["step"]`, `row["validation_loss"]`.

        After a roll-back, and where a run goes on from an older checkpoint, steps come a second time.
        """

    def ended(self, outcome: str) -> None:
        """Training ended: "finished", "stopped early", "interrupted" (the same command goes on), or "failed"."""


class Told:
    """The callbacks of a training that have started and still listen."""

    def __init__(self) -> None:
        self._callbacks: list[Callback] = []
        self.outcome = "failed"

    def start(self, callbacks: Sequence[Callback], folder: Path, step: int, options: dict[str, Any]) -> None:
        for one in callbacks:
            one.started(folder, step, options)
            self._callbacks.append(one)

    def evaluated(self, row: Row) -> None:
        self._tell("evaluated", lambda one: one.evaluated(dict(row)))

    def ended(self) -> None:
        self._tell("ended", lambda one: one.ended(self.outcome))

    def _tell(self, event: str, call: Callable[[Callback], None]) -> None:
        for one in tuple(self._callbacks):
            try:
                call(one)
            except Exception as error:
                self._callbacks.remove(one)
                what = f"{type(one).__name__}.{event} failed ({type(error).__name__}: {error})"
                logger.warning("callbacks: %s; it is left out from here on, and training goes on", what)


@contextmanager
def telling() -> Iterator[Told]:
    """Whatever ends the block, the callbacks that have started are told."""
    told = Told()
    try:
        yield told
    except KeyboardInterrupt:
        told.outcome = "interrupted"
        raise
    finally:
        told.ended()


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse what cannot be told anything."""
    for one in callbacks:
        if not isinstance(one, Callback):
            raise ValueError(f"callbacks: got {one!r}; give objects of subclasses of liam_scale.Callback")
