"""Steps that are recorded once and replayed, on the pretend device: the numbers of steps launched one by one."""

import warnings
from pathlib import Path

import pretend
import pytest
import torch
from small import as_stored, make_model, minibatch

from liam_scale.training import recorded
from liam_scale.training.distributed import World
from liam_scale.training.history import History
from liam_scale.training.optim import KLSchedule, OptimConfig, build_optimizer
from liam_scale.training.options import TrainingConfig
from liam_scale.training.trainer import Trainer
from loaders.minibatch import Minibatch

SIZES = (24, 22, 23, 25, 21, 24, 40, 24, 23, 24, 39, 22, 24)
"""Cells of the steps; those of 40 have twice the entries that there is room for."""


class Source:
    steps_per_epoch, num_cells, waited_seconds = 1_000, 24_000, 0.0

    def state_dict(self) -> dict[str, object]:
        return {}


def make_trainer(
    folder: Path, device: torch.device = pretend.DEVICE, moments: str = "float32", **options: object
) -> Trainer:
    model = make_model(("rna", "atac")).to(device)
    optimizer = build_optimizer(model, OptimConfig(moments=moments))
    optimizer.register_step_post_hook(lambda *_: model.keep_gradients())
    model.train()
    config = TrainingConfig(**{"graph": "auto", **options})
    run = {"kl": KLSchedule("steps", 20, 1e-3), "max_epochs": 1, "seed": 5, "directory": folder}
    world, history = World(device=device), History(None)
    return Trainer(
        model, optimizer, train=Source(), validation=None, world=world, config=config, history=history, **run
    )


def cells(size: int, *, stored: torch.dtype = torch.uint8) -> Minibatch:
    return as_stored(minibatch(size, ("rna", "atac"), transpose=False), stored)


def train(trainer: Trainer, *sizes: int) -> None:
    for size in sizes:
        trainer.step(cells(size))


def launches_of(trainer: Trainer, given: Minibatch) -> int:
    arrived = given.to(pretend.DEVICE)
    with pretend.noting(refuse_waits=True) as noted:
        trainer.step(arrived)
    assert not noted.copies
    return noted.num_launches


@pytest.mark.parametrize(
    ("stored", "moments"),
    [(torch.uint8, "float32"), (torch.uint16, "float32"), (torch.float32, "float32"), (torch.uint8, "bf16")],
)
def test_replayed_steps_give_the_weights_and_losses_of_steps_on_the_cpu(
    stored: torch.dtype, moments: str, tmp_path: Path
) -> None:
    on_cpu = make_trainer(tmp_path, torch.device("cpu"), moments)
    replayed = make_trainer(tmp_path, moments=moments)
    for size in SIZES:
        on_cpu.step(cells(size, stored=torch.float32))
        launches_of(replayed, cells(size, stored=stored))
    assert replayed._update._graph is not None
    for (name, found), expected in zip(replayed.model.named_parameters(), on_cpu.model.parameters(), strict=True):
        # One that is rounded up where the other is rounded down differs by a 256th of a moment.
        atol = 1e-5 if moments == "float32" else 1e-3
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-4, atol=atol, msg=name)
    found, expected = replayed._meter.own(), on_cpu._meter.own()
    assert found == pytest.approx(expected, rel=1e-5 if moments == "float32" else 1e-3)


def test_every_step_has_the_same_launches_and_a_replayed_one_few(tmp_path: Path) -> None:
    eager, replayed = make_trainer(tmp_path, graph="off"), make_trainer(tmp_path)
    counted = [(launches_of(eager, cells(size)), launches_of(replayed, cells(size))) for size in (24, 23, 22) * 3]
    warm, later = counted[1 : recorded.WARM_UPS], counted[recorded.WARM_UPS + 1 :]
    assert len({launches for launches, _ in (*warm, *later)}) == 1
    assert len({launches for _, launches in warm}) == 1
    assert {launches for _, launches in later} == {32}
    assert replayed._update._graph.num_launches > 500
    assert max(launches for launches, _ in warm) < 920


def test_rates_of_bfloat16_moments_are_computed_of_all_parameters_at_once(tmp_path: Path) -> None:
    powers = []
    for moments in ("float32", "bf16"):
        trainer = make_trainer(tmp_path, graph="off", moments=moments)
        train(trainer, 24)
        with pretend.noting(refuse_waits=True) as noted:
            trainer.step(cells(24))
        powers.append(noted.launches["aten::pow"])
    assert powers[1] == powers[0] + 3


def test_a_step_that_cannot_be_recorded_is_told_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, broken = make_trainer(tmp_path, graph="off"), make_trainer(tmp_path)
    spread = broken._soundness.spread

    def waiting(loss: torch.Tensor) -> torch.Tensor:
        if broken.at.global_step == recorded.WARM_UPS:
            loss.item()
        return spread(loss)

    monkeypatch.setattr(broken._soundness, "spread", waiting)
    with pytest.warns(RuntimeWarning, match=r"a step cannot be recorded \(pretend device: the host waits .* item"):
        train(broken, *SIZES[: recorded.WARM_UPS + 1])
    with warnings.catch_warnings(action="error"):
        train(broken, *SIZES[recorded.WARM_UPS + 1 :])
    train(wanted, *SIZES)
    for found, expected in zip(broken.model.parameters(), wanted.model.parameters(), strict=True):
        torch.testing.assert_close(found.detach().cpu(), expected.detach().cpu(), rtol=1e-4, atol=1e-5)
    must = make_trainer(tmp_path, graph="on")
    monkeypatch.setattr(must._soundness, "spread", lambda loss: loss * loss.item())
    with pytest.raises(RuntimeError, match=r"--training.graph: got on, but a step cannot be recorded: .*; use auto"):
        train(must, *SIZES)


def test_a_replayed_step_whose_loss_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    train(trainer, *SIZES[:6])
    before = [p.detach().cpu() for p in trainer.model.parameters()]
    assert not trainer._soundness.is_broken
    trainer.model.prior_mean_rna.fill_(torch.nan)
    train(trainer, *SIZES[:2])
    assert trainer._soundness.is_broken
    assert trainer._soundness.updates == 6
    for found, expected in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(found.detach().cpu(), expected)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_ranks": 2}, "2 ranks average"),
        ({"couples_cells": True}, "likelihood 'original'"),
        ({"has_batch_norm": True}, "batch norm"),
        ({"device": torch.device("cpu")}, "cpu records no steps"),
    ],
)
def test_what_cannot_be_recorded_is_refused_where_it_is_asked_for(options: dict[str, object], why: str) -> None:
    given = {"device": pretend.DEVICE, "num_ranks": 1, "couples_cells": False, "has_batch_norm": False}
    assert recorded.lacks_graph(given.pop("device"), **given) is None
    reason = recorded.lacks_graph(**{"device": pretend.DEVICE, **given, **options})
    recorded.check_graph("auto", reason)
    with pytest.raises(ValueError, match=f"--training.graph: got on, but .*{why}.*; use auto"):
        recorded.check_graph("on", reason)
