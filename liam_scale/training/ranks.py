"""The ranks of a run as torchrun says it, and errors that concern all of them, of which one tells; without torch."""

from __future__ import annotations

import os


def launched_ranks() -> tuple[int, int]:
    """(rank, number of ranks) from torchrun's environment, (0, 1) without it. Touches no device and no network."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_restarted() -> bool:
    """Whether torchrun starts processes again that have not ended well, as nodes come and go.

    One that was told to save and end must not end well then: torchrun would take the training for finished.
    """
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


class AgreedError(RuntimeError):
    """An error that all ranks raise together, so that one of them tells it: `teller`, nobody where that is None."""

    teller: int | None = 0


class LostRank(AgreedError):
    """Another rank is gone, or has failed and told why."""

    def __init__(self, told: str, *, teller: int | None) -> None:
        super().__init__(told)
        self.teller = teller


class ToBeRestarted(AgreedError):
    """Told to save and end, under a torchrun that starts its processes again; nobody tells it."""

    teller = None
