"""What a person sees of a running training: its losses on the bar, or in lines on stdout."""

from __future__ import annotations

import sys
import time
from typing import Literal

from liam_scale.training.history import Row
from loaders.progress import Progress, tell

_BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class LossProgress(Progress):
    """Reports on the main rank; silent on the others (`is_shown=False`)."""

    def __init__(self, *, total_steps: int, start_step: int, is_shown: bool) -> None:
        super().__init__("", total_steps, unit="steps", done=start_step, is_shown=is_shown, bar_format=_BAR)
        self._cells = 0
        # Time, cells and seconds waited at the last losses and at the last evaluation that were shown.
        self._marks = dict.fromkeys(("losses", "evaluation"), (time.monotonic(), 0, 0.0))
        self._unsaid: str | None = None
        self._validation: dict[str, float] = {}

    def advance(self, num_cells: int) -> None:
        """Count a step."""
        self._cells += num_cells
        if self._bar is not None:
            self._bar.update(1)

    def rates(self, waited_seconds: float, *, since: Literal["losses", "evaluation"]) -> tuple[float, float]:
        """(cells a second, share of time spent waiting for data) since the last call; an evaluation shows losses."""
        start, cells, waited = self._marks[since]
        self._marks[since] = self._marks["losses"] = (time.monotonic(), self._cells, waited_seconds)
        elapsed = max(1e-9, self._marks[since][0] - start)
        return (self._cells - cells) / elapsed, min(1.0, max(0.0, waited_seconds - waited) / elapsed)

    def show_losses(self, epoch: int, step: int, losses: dict[str, float], rates: tuple[float, float]) -> None:
        """Between two evaluations."""
        self._show(epoch, step, losses | self._validation, rates)
        self.say()

    def show_evaluation(self, row: Row, *, is_best: bool) -> None:
        """After an evaluation: a line now and then, not one for each of 400 short epochs, but always the last."""
        names: tuple[str, ...] = ("train_loss", "validation_loss", "elbo_validation")
        losses = {name: row[name] for name in names if name in row}
        self._validation = {name: value for name, value in losses.items() if name == "validation_loss"}
        mark = "best so far" if is_best else ""
        self._show(int(row["epoch"]), int(row["step"]), losses, (row["cells_per_second"], row["waiting_share"]), mark)
        if time.monotonic() - self._last_said >= 2.0:
            self.say()

    def _show(
        self, epoch: int, step: int, losses: dict[str, float], rates: tuple[float, float], mark: str = ""
    ) -> None:
        """On the bar at once; a line waits for `say`. First the parts that a narrow terminal has room for."""
        (first, *others) = [f"{name} {value:.4g}" for name, value in losses.items()]
        parts = [first, f"{rates[0]:,.0f} cells/s", *others, f"waiting {rates[1]:.1%}", *([mark] if mark else [])]
        if self._bar is None:
            self._unsaid = "  ".join([f"epoch {epoch}", f"step {step:,}/{self._total:,}", *parts])
            return
        form = self._bar.format_dict
        room = (form["ncols"] or 120) - len(self._bar.format_meter(**{**form, "postfix": None})) - len(", ")
        text = f"epoch {epoch}"
        for part in parts:
            if len(text) + 2 + len(part) > room:
                break
            text += f"  {part}"
        self._bar.set_postfix_str(text)

    def line(self) -> str | None:
        unsaid, self._unsaid = self._unsaid, None
        return unsaid

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        if self._is_shown:
            self._write(text)

    def _write(self, text: str) -> None:
        tell(text, sys.stdout)
