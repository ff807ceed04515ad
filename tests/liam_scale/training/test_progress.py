"""Cells a second: of the losses shown since the last ones, of an evaluation since the one before."""

import pytest

from liam_scale.training import progress


def test_an_evaluation_counts_all_cells_since_the_one_before_though_losses_were_shown_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = progress.LossProgress(total_steps=9, start_step=0, is_shown=False)

    def step(seconds: float) -> None:
        nonlocal now
        now += seconds
        shown.advance(100)

    step(10.0)
    assert shown.rates(5.0, since="losses") == (10.0, 0.5)
    step(2.0)
    assert shown.rates(6.0, since="losses") == (50.0, 0.5)
    step(8.0)
    assert shown.rates(10.0, since="evaluation") == (15.0, 0.5)
    step(4.0)
    assert shown.rates(10.0, since="losses") == (25.0, 0.0)
    assert shown.rates(10.0, since="evaluation") == (25.0, 0.0)
