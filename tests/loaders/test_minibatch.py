"""A minibatch on its way to a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loaders.minibatch import Minibatch, SparseCounts


def test_copies_to_a_gpu_start_in_page_locked_memory_and_do_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.tensor([0, 1], dtype=torch.int32)
    counts = {"rna": SparseCounts(numbers, numbers[:1], torch.ones(1), 3)}
    minibatch = Minibatch(counts, {"rna": torch.ones(1, dtype=torch.bool)}, *(torch.zeros(1).long(),) * 3, num_global=1)
    pinned, copied = [], []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(copy := tensor.clone())
        return copy

    def to(tensor: torch.Tensor, device: Any, *, non_blocking: bool = False) -> torch.Tensor:
        copied.append((tensor, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    minibatch.to(torch.device("cuda", 0))
    assert len(pinned) == 7
    assert all(tensor is source and free for (tensor, free), source in zip(copied, pinned, strict=True))
    pinned.clear()
    minibatch.to("cpu")
    assert not pinned
