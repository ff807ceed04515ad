"""What an ingest tells while it runs: a bar on a terminal, plain lines elsewhere, and its remarks in both."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from loaders.bars import open_bar

_SECONDS_BETWEEN_LINES = 10.0


class Report:
    """Progress of passes over cells, and remarks; all of it on stderr.

    Attributes
    ----------
    remarks
        Everything that was said; kept in the store's provenance.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        self.remarks: list[str] = []
        self._is_shown = is_shown
        self._bar: tqdm | None = None
        self._name, self._total, self._done = "", 0, 0
        self._started = self._last_line = 0.0

    def say(self, remark: str) -> None:
        """Tell and keep a remark."""
        self.remarks.append(remark)
        if self._is_shown:
            tqdm.write(f"note: {remark}", file=sys.stderr)

    def start(self, name: str, num_cells: int) -> None:
        """Begin a pass over cells."""
        self.stop()
        self._name, self._total, self._done = name, num_cells, 0
        self._started = self._last_line = time.monotonic()
        if self._is_shown:
            self._bar = open_bar(total=num_cells, desc=name, unit=" cells", unit_scale=True)

    def advance(self, num_cells: int) -> None:
        """Cells done in this pass."""
        self._done += num_cells
        if self._bar is not None:
            self._bar.update(num_cells)
        elif self._is_shown and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line()

    def stop(self) -> None:
        """End the pass."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._is_shown and self._name:
            self._line()
        self._name = ""

    def _line(self) -> None:
        rate = self._done / max(1e-9, time.monotonic() - self._started)
        print(
            f"{self._name}: {self._done:,} of {self._total:,} cells, {rate:,.0f} cells/s", file=sys.stderr, flush=True
        )
