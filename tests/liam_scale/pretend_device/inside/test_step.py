"""A training step on the pretend device: numbers of the CPU, no wait for the device, no copy of pageable memory."""

import pretend
import pytest
import torch
from small import as_stored, make_model, minibatch

from liam_scale.kernels import options as kernel_options
from liam_scale.model import logistic_normal_mean
from liam_scale.training.distributed import World
from liam_scale.training.history import Meter
from liam_scale.training.optim import OptimConfig, build_optimizer
from liam_scale.training.update import Soundness

CASES = {
    "as a rule": {},
    "without transposes": {"transpose": False},
    "counts as stored": {"transpose": False, "stored": torch.uint8},
    "counts above 255 as stored": {"transpose": False, "stored": torch.uint16},
    "the original's likelihood": {"likelihood": "original"},
    "the original's likelihood without transposes": {"likelihood": "original", "transpose": False},
    "batch norm": {"use_batch_norm_encoder": True, "use_batch_norm_decoder": True},
    "one cell": {"num_cells": 1},
    "empty cells": {"density": 0.0},
    "many tiles": {"tile_bytes": 20_000},
    "moments in bfloat16": {"moments": "bf16"},
    "three modalities": {"modalities": ("rna", "atac", "adt"), "transpose": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_cpu_and_never_waits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = dict(CASES[case])
    num_cells, modalities = chosen.pop("num_cells", 24), chosen.pop("modalities", ("rna", "atac"))
    cells = minibatch(
        num_cells, modalities, transpose=chosen.pop("transpose", True), density=chosen.pop("density", 0.2)
    )
    stored, moments = chosen.pop("stored", None), chosen.pop("moments", "float32")
    if tile_bytes := chosen.pop("tile_bytes", None):
        monkeypatch.setattr(kernel_options, "GPU_TILE_BYTES", tile_bytes)
        kernel_options.memory_of_tiles.cache_clear()
    on_cpu, on_device = make_model(modalities, **chosen), make_model(modalities, **chosen).to(pretend.DEVICE)
    given = cells if stored is None else as_stored(cells, stored)
    keys = {"step": 3, "seed": 1, "kl_weight": 0.5, "cell_weight": 1 / num_cells}
    expected = on_cpu(cells, **keys, num_global_with=on_cpu.num_cells_with(cells))
    expected.loss.backward()
    world = World(device=pretend.DEVICE)
    optimizer = build_optimizer(on_device, OptimConfig(moments=moments))
    optimizer.register_step_post_hook(lambda *_: on_device.keep_gradients())
    soundness, meter = Soundness(optimizer, world), Meter(world)
    with pretend.noting(refuse_waits=True) as noted:
        arrived = given.to(pretend.DEVICE)
        found = on_device(arrived, **keys, num_global_with=on_device.num_cells_with(arrived))
        soundness.spread(found.loss).backward()
        soundness.judge()
        gradients = {name: p.grad for name, p in on_device.named_parameters()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.add({"train_loss": found.loss.detach(), **found.terms}, cells=num_cells)
    kernel_options.memory_of_tiles.cache_clear()
    assert "pageable" not in noted.copies
    torch.testing.assert_close(found.loss.detach().cpu(), expected.loss.detach(), rtol=2e-6, atol=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in on_cpu.parameters())
    for name, parameter in on_cpu.named_parameters():
        atol = 1e-5 * float(parameter.grad.abs().max()) + 1e-7 * largest
        torch.testing.assert_close(gradients[name].cpu(), parameter.grad, rtol=1e-5, atol=atol, msg=name)
    for name, term in expected.terms.items():
        torch.testing.assert_close(found.terms[name].cpu(), term, rtol=1e-5, atol=1e-4)


def test_the_latent_space_and_its_mean_are_those_of_the_cpu() -> None:
    cells = minibatch(40, ("rna", "atac"), transpose=False)
    on_cpu = make_model(("rna", "atac")).eval()
    expected = on_cpu.latent(cells)
    on_device = make_model(("rna", "atac")).eval().to(pretend.DEVICE)
    with pretend.noting() as noted:
        found = on_device.latent(cells.to(pretend.DEVICE))
    assert not noted.waits
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
    means = [logistic_normal_mean(*latent).cpu() for latent in (found, expected)]
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)


def test_tensors_of_two_devices_are_refused_and_waits_are_noted() -> None:
    """The gate itself: what it lets pass on the CPU would be an error, or slow, on a GPU."""
    here, there = torch.ones(3), torch.ones(3, device=pretend.DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        torch.mm(there[None], here[:, None])
    with pretend.noting() as noted:
        there.sum().item()
        there[there > 0]
        torch.tensor(1.0, device=pretend.DEVICE)
        torch.repeat_interleave(torch.ones(2, dtype=torch.long, device=pretend.DEVICE))
        there.cpu()
    copies = {"copy to the device", "copy to the host"}
    assert noted.waits.keys() == {"item", "aten::nonzero", "aten::repeat_interleave", *copies}
    assert noted.copies["pageable"] == 4 + 12
    with pretend.noting(refuse_waits=True), pytest.raises(RuntimeError, match="the host waits for the device in item"):
        there.sum().item()


def test_a_copy_that_nobody_waited_for_is_seen() -> None:
    side, arrived = torch.pretend.Stream(), torch.pretend.Event()
    host = torch.arange(5.0).pin_memory()
    with torch.pretend.stream(side):
        copy = host.to(pretend.DEVICE, non_blocking=True)
        arrived.record(side)
    assert not arrived.query()
    assert copy.cpu().isnan().all()
    torch.pretend.current_stream().wait_event(arrived)
    assert arrived.query()
    assert copy.tolist() == host.tolist()
