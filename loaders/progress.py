"""Long work as a person watches it: a bar on a terminal or in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import errno
import os
import sys
import time
import warnings
from typing import Any, Self, TextIO

from tqdm import TqdmWarning, tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """What is done of a total, on stderr.

    Parameters
    ----------
    name, total, unit
        What is done, how much of it there is, and of what: "rna: read and check", 12,000, "cells".
    done
        What was done before.
    is_shown
        False: say nothing.
    **options
        Further options of tqdm.
    """

    def __init__(
        self, name: str, total: int, *, unit: str, done: int = 0, is_shown: bool = True, **options: Any
    ) -> None:
        self._name, self._total, self._unit, self._is_shown = name, total, unit, is_shown
        self._done, self._before = done, done
        self._began = self._last_said = time.monotonic()
        options = {"desc": name or None, "unit": f" {unit}", "initial": done, **options}
        self._bar = _open_bar(total=total, **options) if is_shown else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def advance(self, count: int) -> None:
        """Count what was done; a line follows where one is due."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.is_due:
            self.say()

    @property
    def is_due(self) -> bool:
        """Whether it is time to show something new: each second on a bar, now and then as a line."""
        seconds = 1.0 if self._bar is not None else SECONDS_BETWEEN_LINES
        return self._is_shown and time.monotonic() - self._last_said >= seconds

    def line(self) -> str | None:
        """What stands in a line; None where there is nothing new."""
        rate = (self._done - self._before) / max(1e-9, time.monotonic() - self._began)
        return f"{self._name}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f} {self._unit}/s"

    def say(self) -> None:
        """Write the line, where there is no bar."""
        self._last_said = time.monotonic()
        if self._is_shown and self._bar is None and (text := self.line()) is not None:
            self._write(text)

    def _write(self, text: str) -> None:
        tell(text, sys.stderr)

    def close(self) -> None:
        """End the bar, or write the last line."""
        if self._bar is not None:
            self._bar.close()
        self.say()


def tell(text: str, file: TextIO) -> None:
    """Print a line. A terminal that was closed takes none (nor does tqdm mind): its SIGHUP says what follows."""
    try:
        print(text, file=file, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def _open_bar(*, total: int, **options: Any) -> tqdm | None:
    """A bar on a terminal (stderr) or in a notebook; None elsewhere."""
    with warnings.catch_warnings():
        # It warns that it is experimental, and that a notebook without ipywidgets has no bar.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.autonotebook import tqdm as bar_of_here
    if bar_of_here is not tqdm:
        return bar_of_here(total=total, **(options | {"bar_format": None}))
    # A terminal without a size (`docker run -t`, `script`) would be told nothing at all by tqdm.
    if not sys.stderr.isatty() or not all(os.get_terminal_size(sys.stderr.fileno())):
        return None
    return tqdm(total=total, dynamic_ncols=True, file=sys.stderr, **options)
