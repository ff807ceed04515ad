"""The pretend device in the place of a GPU."""

import pretend
import pytest
import torch

from liam_scale.training import devices
from liam_scale.training.trainer import Trainer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """`--device auto` finds it."""
    monkeypatch.setattr(devices, "gpu", lambda: pretend.DEVICE)
    return pretend.DEVICE


@pytest.fixture
def steps(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[pretend.Noted]:
    """What each step of a training notes; one that waits for the device is an error."""
    noted: list[pretend.Noted] = []
    step = Trainer.step

    def watched(trainer: Trainer, *arguments: object) -> None:
        with pretend.noting(refuse_waits=True) as found:
            step(trainer, *arguments)
        noted.append(found)

    monkeypatch.setattr(Trainer, "step", watched)
    return noted
