"""What a person sees of a running training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from liam_scale.training.history import Row

SECONDS_BETWEEN_LINES = 15.0


def _describe(losses: dict[str, float], cells_per_second: float, waiting_share: float) -> str:
    parts = [f"{name} {value:.4g}" for name, value in losses.items()]
    return "  ".join([*parts, f"{cells_per_second:,.0f} cells/s", f"waiting {waiting_share:.1%}"])


class Progress:
    """Reports on the main rank; silent on the others (`is_shown=False`)."""

    def __init__(self, *, total_steps: int, start_step: int, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._total = total_steps
        self._last_line = time.monotonic()
        self._last_update = time.monotonic()
        self._cells = 0
        self._waited = 0.0
        self._bar: tqdm | None = None
        if is_shown and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)

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
        self._last_line = time.monotonic()
        if not self._is_shown:
            return
        text = _describe(losses, *rates)
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {epoch}  {text}")
        else:
            print(f"epoch {epoch}  step {step:,}/{self._total:,}  {text}", flush=True)

    def show_evaluation(self, row: Row, *, is_best: bool) -> None:
        """After an evaluation: a line now and then, not one for each of 400 short epochs."""
        if not self._is_shown or self._bar is not None or time.monotonic() - self._last_line < 2.0:
            return
        self._last_line = time.monotonic()
        names: tuple[str, ...] = ("train_loss", "validation_loss", "elbo_validation")
        losses = {name: row[name] for name in names if name in row}
        text = _describe(losses, row["cells_per_second"], row["waiting_share"])
        mark = "  best so far" if is_best else ""
        print(f"epoch {int(row['epoch'])}  step {int(row['step']):,}/{self._total:,}  {text}{mark}", flush=True)

    def message(self, text: str) -> None:
        if not self._is_shown:
            return
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
