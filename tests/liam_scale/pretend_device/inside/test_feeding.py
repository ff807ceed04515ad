"""Minibatches that a loader hands out on the pretend device, whose copies arrive only when they are waited for."""

from dataclasses import fields
from pathlib import Path

import pretend
import torch

from loaders import Loader, LoaderConfig, open_store
from loaders.minibatch import Minibatch


def tensors(minibatch: Minibatch) -> list[torch.Tensor]:
    counts = [getattr(c, f.name) for c in minibatch.counts.values() for f in fields(c)]
    held = [*counts, *minibatch.present.values(), minibatch.sample, minibatch.place, minibatch.rows]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


def test_they_are_those_of_the_host_by_one_pinned_copy_a_group(trimodal: Path) -> None:
    store, options = open_store(trimodal), {"sample": "sample", "transpose": False, "values": "stored"}
    config = LoaderConfig(minibatch=64, memory="16MiB", adt_transform="none")
    with Loader(store, config, **options) as on_host, Loader(store, config, device=pretend.DEVICE, **options) as moved:
        for _ in range(3):
            with pretend.noting(refuse_waits=True) as noted:
                arrived = list(moved)
            assert not noted.waits
            assert "pageable" not in noted.copies
            assert 1 <= noted.copies["to the device"] <= len(arrived)
            for found, expected in zip(arrived, on_host, strict=True):
                assert (found.epoch, found.step, found.num_global) == (
                    expected.epoch,
                    expected.step,
                    expected.num_global,
                )
                for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
                    assert ours.device == pretend.DEVICE
                    assert ours.dtype == theirs.dtype
                    assert torch.equal(ours.cpu(), theirs)


def test_host_memory_is_used_again_only_after_its_copy(trimodal: Path) -> None:
    """Copies begin on a side stream; one that nobody waits for yet keeps the memory that it will read."""
    store = open_store(trimodal)
    with Loader(store, LoaderConfig(minibatch=32, memory="16MiB"), device=pretend.DEVICE, transpose=False) as loader:
        first = next(iter(loader))
        expected = [tensor.cpu() for tensor in tensors(first)]
        for _ in range(2):
            list(loader)
        for found, before in zip(tensors(first), expected, strict=True):
            assert torch.equal(found.cpu(), before)
        assert len(loader._handover._under_way) <= loader._sizes.ahead + 1
