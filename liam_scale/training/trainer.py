"""The training loop: steps, evaluations, early stopping, checkpoints, on any number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn, cast

import torch
from torch import Tensor, nn

from liam_scale.training.checkpoint import Checkpoint, save_checkpoint, taking_up
from liam_scale.training.distributed import World, averaging
from liam_scale.training.history import History, Meter, Row, summarise
from liam_scale.training.optim import KLSchedule, load_optimizer_tensors, optimizer_tensors
from liam_scale.training.options import TrainingConfig
from liam_scale.training.progress import LossProgress
from liam_scale.training.protocols import ByCell, MinibatchSource
from liam_scale.training.ranks import AgreedError
from liam_scale.training.recorded import as_recorded
from liam_scale.training.shared_adam import SharedAdam
from liam_scale.training.signals import INTERRUPT, StopRequest
from liam_scale.training.update import Given, NotFinite, Setback, Soundness, Update, not_finite
from loaders.minibatch import Minibatch

STEPS_BETWEEN_AGREEMENTS = 10
"""Ranks compare their wishes (stop, save) this often: one all-reduce of three integers, 0.1 ms on gloo."""

VALIDATION_STEP = -1
"""Key of the validation noise: the same draw at every evaluation, so that early stopping compares weights."""

Outcome = Literal["finished", "stopped early", "interrupted"]


@dataclass
class Progression:
    """Where a run stands: all that changes besides tensors."""

    epoch: int = 0
    global_step: int = 0
    best_metric: float = float("inf")
    best_epoch: int = -1
    best_step: int = 0
    evaluations_since_best: int = 0

    def __post_init__(self) -> None:
        counts = self.epoch, self.global_step, self.best_step, self.evaluations_since_best
        is_sound = all(type(count) is int and count >= 0 for count in counts) and type(self.best_epoch) is int
        if not is_sound or type(self.best_metric) not in (int, float):
            raise ValueError(f"got the position {vars(self)}")


class Trainer:
    """Trains a model on the minibatches of a source.

    Parameters
    ----------
    model
        A module whose forward takes (minibatch, step, seed, kl_weight, cell_weight, num_global_with) and returns an
        object with `loss` (scalar) and `terms` (summed over this rank's cells).
    couples_cells
        Whether the loss of a cell depends on the rest of the global minibatch (`likelihood="original"`): then ranks
        exchange at every step how many of their cells have each modality.
    other_noise_from
        Steps from each of which on the noise is another one: where training was rolled back to.
    columns
        Further values of a row of the history.
    reduce_bf16
        DDP averages gradients in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        train: MinibatchSource,
        validation: MinibatchSource | None,
        world: World,
        config: TrainingConfig,
        kl: KLSchedule,
        max_epochs: int,
        seed: int,
        directory: Path,
        history: History,
        couples_cells: bool = False,
        other_noise_from: Sequence[int] = (),
        columns: Callable[[], Row] = dict,
        reduce_bf16: bool = False,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.train_source, self.validation_source = train, validation
        self.world, self.config, self.kl = world, config, kl
        self.max_epochs, self.seed, self.directory = max_epochs, seed, directory
        self.history, self.columns = history, columns
        self.couples_cells, self.other_noise_from = couples_cells, other_noise_from
        self.at = Progression()
        self._meter = Meter(world)
        self._best: dict[str, Tensor] | None = None
        self._stop = StopRequest()
        self._soundness = Soundness(optimizer, world)
        self._start_step, self._saved_step = 0, -1
        self.progress = LossProgress(total_steps=0, start_step=0, is_shown=False)
        self._last_checkpoint = time.monotonic()
        self._module: nn.Module = model
        if world.size > 1 and not isinstance(optimizer, SharedAdam):
            self._module = averaging(model, world, in_bf16=reduce_bf16)
        update = Update(self._module, optimizer, self._soundness, self._give_up)
        self._update = as_recorded(update, config.graph, world, couples_cells=couples_cells)
        self.max_steps = max_epochs * train.steps_per_epoch
        if config.max_steps is not None:
            self.max_steps = min(self.max_steps, config.max_steps)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint of this run; the next minibatch is the one after the last that was trained."""
        with taking_up(checkpoint) as (tensors, state):
            self.model.load_state_dict(tensors["model"])
            load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])
            self._best = dict(tensors["best"]) if "best" in tensors and self.world.is_main else None
            self.at = Progression(**state["at"])
            self._start_step = self._saved_step = self.at.global_step
            self.history.rows = list(state["history"])
            self.history.write()
            self.train_source.load_state_dict(state["loader"])
            # Sums were added up over all ranks; one rank carries them on.
            self._meter = Meter(self.world, state["sums"] if self.world.is_main else None, cells=state["cells_seen"])
        self._check_alike()

    def _check_alike(self) -> None:
        """Ranks that took up different weights would train on without notice."""
        total = torch.stack([p.detach().double().sum() for p in self.model.parameters()]).sum()
        steps, totals = zip(*self.world.gather((self.at.global_step, float(total))), strict=True)
        # The last bits of a sum depend on the number of threads.
        if len(set(steps)) > 1 or max(totals) - min(totals) > 1e-9 * max(1.0, abs(totals[0])):
            raise AgreedError(
                f"resume: ranks took up different checkpoints of {self.directory} (steps {steps}, sums of weights "
                f"{totals}); see that all of them see the same --out, and start again"
            )

    def save(self) -> None:
        """Write a checkpoint of the position just trained. Every rank calls it, the main rank writes.

        Raises
        ------
        RuntimeError
            Weights or moments are not finite, or the disk is full; earlier checkpoints stay.
        """
        self.world.enters(f"saving the checkpoint of step {self.at.global_step:,}")
        self._require_sound()
        moments = optimizer_tensors(self.model, self.optimizer)
        broken = not_finite(moments)
        if broken:
            self._give_up(f"{broken[0]} of Adam")
        sums = self._meter.totals()
        if self.world.is_main:
            tensors = {"model": self.model.state_dict(), "optimizer": moments}
            if self._best is not None:
                tensors["best"] = self._best
            state = {
                "at": vars(self.at),
                "sums": sums,
                "cells_seen": self._meter.cells,
                "history": self.history.rows,
                "loader": self.train_source.state_dict(),
            }
            save_checkpoint(
                self.directory, Checkpoint(tensors, state), step=self.at.global_step, keep=self.config.keep_checkpoints
            )
        self._last_checkpoint, self._saved_step = time.monotonic(), self.at.global_step

    def best_weights(self) -> dict[str, Tensor]:
        """Weights of the best evaluation, which the main rank keeps; the present ones where there was none."""
        return self._best if self._best is not None else self.model.state_dict()

    def fit(self) -> Outcome:
        """Train to the end, to early stopping, or to a signal (SIGTERM, SIGUSR1, SIGHUP), which saves first.

        Raises
        ------
        KeyboardInterrupt
            After Ctrl-C, when the checkpoint is written.
        NotFinite
            A loss, a gradient or a weight is not finite; no update was made with it.
        """
        is_shown = self.world.is_main
        self.progress = LossProgress(total_steps=self.max_steps, start_step=self.at.global_step, is_shown=is_shown)
        self.model.train()
        try:
            with self._stop.listening():
                return self._fit()
        except NotFinite as error:
            if not self._soundness.is_broken:
                raise
            raise NotFinite(self._blame(error.setback)) from None
        finally:
            self.progress.close()
            self.history.close()

    def _fit(self) -> Outcome:
        while self.at.global_step < self.max_steps and not self._has_converged():
            for minibatch in self.train_source:
                self.step(minibatch)
                if self._wants_evaluation():
                    self._evaluate()
                if self._agree_to_stop():
                    return "interrupted"
                if self.at.global_step >= self.max_steps or self._has_converged():
                    break
        if self._meter.cells:
            self._evaluate()
        if self._saved_step != self.at.global_step:
            self.save()
        return "stopped early" if self._has_converged() else "finished"

    def step(self, minibatch: Minibatch) -> None:
        """Loss, gradients and update of one minibatch."""
        self.world.enters(f"the update after step {self.at.global_step:,}")
        minibatch = minibatch.to(self.world.device)
        self.at.epoch = minibatch.epoch
        cell_weight = self.world.size / minibatch.num_global
        given = Given(
            step=self.at.global_step,
            seed=self._noise_seed(self.at.global_step),
            kl_weight=self.kl(self.at.epoch, self.at.global_step),
            cell_weight=cell_weight,
            num_global_with=self._cells_with(minibatch),
        )
        objective = self._update(minibatch, given)
        loss = objective.loss.detach() / cell_weight
        self._meter.add({"train_loss": loss, **objective.terms}, cells=minibatch.num_global)
        self.at.global_step += 1
        self.world.enters(f"reading the cells after step {self.at.global_step:,}")
        self.progress.advance(minibatch.num_global)

    def _noise_seed(self, step: int) -> int:
        """The run's own seed until the first roll-back, another one after each."""
        return self.seed + (sum(first <= step for first in self.other_noise_from) << 48)

    def _cells_with(self, minibatch: Minibatch) -> dict[str, Tensor] | None:
        """Cells of the global minibatch that enter the terms of each modality, where the loss needs to know."""
        if not self.couples_cells:
            return None
        own = cast(ByCell, self.model).num_cells_with(minibatch)
        counts = self.world.sum(torch.stack(list(own.values())))
        return dict(zip(own, counts.double().unbind(), strict=True))

    def _wants_evaluation(self) -> bool:
        every = self.config.validate_every or self.train_source.steps_per_epoch
        return self.at.global_step % every == 0

    def _has_converged(self) -> bool:
        """Whether early stopping ends the run; decided by the last evaluation, so that an ended run stays ended."""
        evaluated_step = self.history.rows[-1]["step"] if self.history.rows else 0
        is_patient = self.at.evaluations_since_best < self.config.patience
        is_early = evaluated_step - self.at.best_step < self.config.patience_steps
        return self.config.early_stopping and not (is_patient or is_early)

    def _agree_to_stop(self) -> bool:
        """Every few steps: look at the losses, save if it is time, and say whether any rank was told to stop."""
        every = self.config.checkpoint_steps
        is_due = every is not None and self.at.global_step % every == 0
        if self.at.global_step % STEPS_BETWEEN_AGREEMENTS and not is_due:
            return False
        if every is None:
            is_due = time.monotonic() - self._last_checkpoint >= self.config.checkpoint_seconds
        if self.world.device.type != "cpu":
            self._require_sound()
        wish, due = self.world.largest([self._stop.wish, int(is_due)])
        if wish or due:
            self.save()
        where = f"epoch {self.at.epoch}, step {self.at.global_step:,}; the same command goes on from there"
        if wish == INTERRUPT:
            raise KeyboardInterrupt(f" at {where}")
        if wish:
            self.progress.message(f"stopped at {where}")
        elif self._meter.cells and self.progress.is_due:
            self._show_losses()
        return bool(wish)

    def _require_sound(self) -> None:
        """Before anything is kept or called best."""
        if self._soundness.is_broken:
            self._give_up()
        # A state_dict would join each output weight with its library column, a copy of the largest tensors.
        broken = not_finite({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())})
        if broken:
            self._give_up(broken[0])

    def _give_up(self, *names: str) -> NoReturn:
        """Numbers are not finite, and weights stay as they are. All ranks come here together."""
        raise NotFinite(Setback(self._start_step + self._soundness.updates, names or ("a loss",)))

    def _blame(self, setback: Setback) -> Setback:
        """Find the cells: weights are still those of the step, whose minibatch is read and scored once more."""
        self.optimizer.zero_grad(set_to_none=True)
        epoch, step = divmod(setback.step, self.train_source.steps_per_epoch)
        self.train_source.load_state_dict({**self.train_source.state_dict(), "epoch": epoch, "step": step})
        minibatch = next(iter(self.train_source)).to(self.world.device)
        terms = cast(ByCell, self.model).terms_by_cell(
            minibatch,
            step=setback.step,
            seed=self._noise_seed(setback.step),
            num_global_with=self._cells_with(minibatch),
        )
        own = {name: minibatch.rows[~values.isfinite()].tolist() for name, values in terms.items()}
        everywhere = self.world.gather((setback.names, own))
        losses = dict.fromkeys(n for names, _ in everywhere for n in names if not n.startswith("gradient"))
        rows = {name: sorted(row for _, found in everywhere for row in found[name]) for name in own}
        return Setback(
            setback.step, tuple(losses) or setback.names, {name: found for name, found in rows.items() if found}
        )

    def _show_losses(self) -> None:
        """Means over this rank's cells since the last evaluation: a glance, not the history."""
        means = self._meter.glance()
        losses = {"loss": means["train_loss"]}
        losses |= {
            name.removeprefix("reconstruction_loss_"): value
            for name, value in means.items()
            if name.startswith("reconstruction_loss_")
        }
        rates = self.progress.rates(self.train_source.waited_seconds, since="losses")
        self.progress.show_losses(self.at.epoch, self.at.global_step, losses, rates)

    def _evaluate(self) -> None:
        """Append a row to the history; remember the weights if they are the best so far."""
        self._require_sound()
        sums, cells = self._meter.totals(), max(1, self._meter.cells)
        train_loss = sums.pop("train_loss")
        rates = self.progress.rates(self.train_source.waited_seconds, since="evaluation")
        row: Row = {
            "epoch": self.at.epoch,
            "step": self.at.global_step,
            "kl_weight": self.kl(self.at.epoch, self.at.global_step - 1),
            "train_loss": train_loss / cells,
            **summarise(sums, cells, "train"),
        }
        if self.validation_source is not None:
            row |= self._validation_row(self.validation_source)
            if not math.isfinite(row["validation_loss"]):
                self._give_up("validation_loss")
        row |= {"cells_per_second": rates[0], "waiting_share": rates[1], **self.columns()}
        is_best = self._remember(row)
        self._meter = Meter(self.world)
        self.history.append(row)
        self.progress.show_evaluation(row, is_best=is_best)

    def _validation_row(self, source: MinibatchSource) -> Row:
        meter = Meter(self.world)
        # The KL weight is the one that training ends with: under the growing weight of the original the loss rises
        # as the schedule does, and early stopping would compare epochs by their date.
        kl_weight = self.kl(self.max_epochs - 1, self.max_steps - 1)
        self.model.eval()
        with torch.no_grad():
            for minibatch in source:
                self.world.enters(f"the evaluation after step {self.at.global_step:,}")
                on_device = minibatch.to(self.world.device)
                objective = self.model(
                    replace(on_device, place=on_device.rows),
                    step=VALIDATION_STEP,
                    seed=self.seed,
                    kl_weight=kl_weight,
                    cell_weight=1.0,
                    num_global_with=self._cells_with(on_device),
                )
                meter.add({"validation_loss": objective.loss, **objective.terms})
        self.model.train()
        sums = meter.totals()
        loss = sums.pop("validation_loss") / source.num_cells
        return {"validation_loss": loss, **summarise(sums, source.num_cells, "validation")}

    def _remember(self, row: Row) -> bool:
        """Keep a copy of the weights if this is the best evaluation; True if it is."""
        metric = row.get("validation_loss")
        if metric is None:
            return False
        if metric >= self.at.best_metric - self.config.min_delta:
            self.at.evaluations_since_best += 1
            return False
        self.at.best_metric, self.at.evaluations_since_best = metric, 0
        self.at.best_epoch, self.at.best_step = self.at.epoch, self.at.global_step
        if not self.world.is_main:
            return True
        weights = self.model.state_dict()
        if self._best is None:
            self._best = {name: value.detach().clone() for name, value in weights.items()}
        for name, value in weights.items():
            self._best[name].copy_(value)
        return True
