"""What a person sees of a running training: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import time

from liam_scale.training.history import Row
from loaders.bars import open_bar

SECONDS_BETWEEN_LINES = 15.0

_BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Progress:
    """Reports on the main rank; silent on the others (`is_shown=False`)."""

    def __init__(self, *, total_steps: int, start_step: int, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._total = total_steps
        self._last_line = time.monotonic()
        self._last_update = time.monotonic()
        self._cells = 0
        self._waited = 0.0
        self._unsaid: str | None = None
        self._validation: dict[str, float] = {}
        self._bar = open_bar(total=total_steps, initial=start_step, unit="step", bar_format=_BAR) if is_shown else None

    def advance(self, num_cells: int) -> None:
        self._cells += num_cells
        if self._bar is not None:
            self._bar.update(1)

    @property
    def wants_losses(self) -> bool:
        """Whether it is time to show losses; reading them from a GPU waits for it, so not at every step."""
        interval = 1.0 if self._bar is not None else SECONDS_BETWEEN_LINES
        return self._is_shown and time.monotonic() - self._last_line >= interval

    def rates(self, waited_seconds: float) -> tuple[float, float]:
        """(cells a second, share of time spent waiting for data) since the last call."""
        now = time.monotonic()
        elapsed = max(1e-9, now - self._last_update)
        result = self._cells / elapsed, min(1.0, max(0.0, waited_seconds - self._waited) / elapsed)
        self._last_update, self._cells, self._waited = now, 0, waited_seconds
        return result

    def show_losses(self, epoch: int, step: int, losses: dict[str, float], rates: tuple[float, float]) -> None:
        """Between two evaluations."""
        self._show(epoch, step, losses | self._validation, rates)
        self._say()

    def show_evaluation(self, row: Row, *, is_best: bool) -> None:
        """After an evaluation: a line now and then, not one for each of 400 short epochs, but always the last."""
        names: tuple[str, ...] = ("train_loss", "validation_loss", "elbo_validation")
        losses = {name: row[name] for name in names if name in row}
        self._validation = {name: value for name, value in losses.items() if name == "validation_loss"}
        mark = "best so far" if is_best else ""
        self._show(int(row["epoch"]), int(row["step"]), losses, (row["cells_per_second"], row["waiting_share"]), mark)
        if time.monotonic() - self._last_line >= 2.0:
            self._say()

    def _show(
        self, epoch: int, step: int, losses: dict[str, float], rates: tuple[float, float], mark: str = ""
    ) -> None:
        """On the bar at once; a line waits for `_say`. First the parts that a narrow terminal has room for."""
        if not self._is_shown:
            return
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

    def _say(self) -> None:
        self._last_line = time.monotonic()
        if self._unsaid is not None:
            print(self._unsaid, flush=True)
            self._unsaid = None

    def message(self, text: str) -> None:
        if not self._is_shown:
            return
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """End the bar, or tell the losses that no line has told yet."""
        if self._bar is not None:
            self._bar.close()
        self._say()
