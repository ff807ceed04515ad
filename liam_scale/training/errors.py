"""Errors that concern all ranks of a run, of which one tells them."""

from __future__ import annotations


class AgreedError(RuntimeError):
    """An error that all ranks raise together, so that one of them tells it: `teller`, nobody where that is None."""

    teller: int | None = 0


class LostRank(AgreedError):
    """Another rank is gone, or has failed and told why."""

    def __init__(self, told: str, *, teller: int | None) -> None:
        super().__init__(told)
        self.teller = teller
