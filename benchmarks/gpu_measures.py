"""What benchmarks/gpu.py measures, on any device."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liam_scale.kernels.negative_binomial import negative_binomial
from liam_scale.kernels.negative_multinomial import negative_multinomial
from liam_scale.model import Liam, ModelConfig, ModelData
from liam_scale.model.noise import hash_bits
from liam_scale.training.distributed import World
from liam_scale.training.history import History
from liam_scale.training.optim import KLSchedule, OptimConfig, build_optimizer
from liam_scale.training.options import TrainingConfig
from liam_scale.training.trainer import Trainer
from loaders.minibatch import Minibatch, SparseCounts

GRADIENT_GATES = {"float32": 1e-6, "tf32": 1e-3, "bf16": 1e-2}
"""Error of a gradient, of its norm; float32 beyond that of the plain formula."""
CELL_GATE = 1e-4
"""Error of a cell's log-likelihood, of the largest."""
SHALLOW_CELL_GATE = 2e-3
"""The same in tf32 and bf16 for cells of fewer non-zeros than `DEEP`, in whose sums rounding does not average out."""
DEEP = 800
ROUNDING = {"float32": 1.0, "tf32": 2.0**13, "bf16": 2.0**16}
"""Of the operands of products, in units of float32's."""


@dataclass(frozen=True)
class Shape:
    """Features and non-zeros a cell of each modality."""

    genes: int
    peaks: int
    genes_found: int
    peaks_found: int
    samples: int = 13


PAPER = Shape(13_431, 116_490, 800, 3_600)
SMALL = Shape(60, 150, 20, 40, samples=3)


@functools.lru_cache(maxsize=8)
def make_counts(cells: int, features: int, found: int, device: torch.device, *, seed: int = 0) -> SparseCounts:
    """Counts as a store holds them (uint8) on a device, a tenth of the cells empty, without transposes."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.integers(int(found * 0.7), int(found * 1.3) + 1, cells), features)
    lengths[: cells // 10] = 0
    columns = [np.unique(rng.integers(0, features, size)) for size in lengths]
    lengths = np.array([len(found_columns) for found_columns in columns], dtype=np.int64)
    indices = np.concatenate([*columns, np.zeros(0, np.int64)]).astype(np.int32)
    values = np.minimum(rng.geometric(0.6, len(indices)), 255).astype(np.uint8)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    found_counts = SparseCounts(*map(torch.from_numpy, (indptr, indices, values)), features)
    return found_counts.map_tensors(lambda tensor: tensor.to(device))


def make_minibatch(cells: int, shape: Shape, device: torch.device, *, seed: int = 0) -> Minibatch:
    counts = {
        "rna": make_counts(cells, shape.genes, shape.genes_found, device, seed=seed),
        "atac": make_counts(cells, shape.peaks, shape.peaks_found, device, seed=seed + 1),
    }
    places = torch.arange(cells, device=device)
    present = {name: torch.ones(cells, dtype=torch.bool, device=device) for name in counts}
    return Minibatch(counts, present, places % shape.samples, places, places, cells)


def make_model(shape: Shape, device: torch.device, **options: Any) -> Liam:
    data = ModelData(
        num_features={"rna": shape.genes, "atac": shape.peaks},
        samples=tuple(map(str, range(shape.samples))),
        prior_mean=dict.fromkeys(("rna", "atac"), (7.0,) * shape.samples),
        prior_variance=dict.fromkeys(("rna", "atac"), (0.3,) * shape.samples),
    )
    return Liam(ModelConfig(modalities=("rna", "atac"), **options), data).to(device)


@dataclass(frozen=True)
class Problem:
    """A likelihood of a decoder at first weights, and the size of its cells."""

    name: str
    cells: int
    features: int
    found: int
    hidden: int
    library: float

    def given(self, device: torch.device) -> tuple[SparseCounts, list[Tensor], Tensor, Tensor]:
        """Counts, differentiable inputs, weights of the cells (a fifth 0), samples."""
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int, bound: float) -> Tensor:
            return (torch.rand(*shape, generator=generator) * 2 - 1).mul_(bound).to(device)

        bound = self.hidden**-0.5
        hidden = torch.relu(uniform(self.cells, self.hidden, bound=3.0))
        inputs = [hidden, uniform(self.features, self.hidden, bound=bound), uniform(self.features, bound=bound)]
        size = torch.full((self.cells,), self.library, device=device)
        if self.name == "negative_binomial":
            inputs += [size, uniform(self.features, 3, bound=2.0)]
        else:
            inputs += [uniform(self.cells, bound=1.0).exp(), size, uniform(self.features, bound=bound)]
        weights = torch.ones(self.cells, device=device)
        weights[: self.cells // 5] = 0
        counts = make_counts(self.cells, self.features, self.found, device)
        return counts, inputs, weights, torch.arange(self.cells, device=device) % 3

    def run(self, device: torch.device, *, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
        """Loss, log-likelihoods and all gradients."""
        counts, inputs, weights, sample = self.given(device)
        p = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        options["cell_weight"] = weights.to(dtype)
        if self.name == "negative_binomial":
            loss, found = negative_binomial(counts, *p, sample, **options)
        else:
            likelihood = "original" if self.name == "original" else "per-cell"
            sizes = {"library": p[4], "library_weight": p[5], "likelihood": likelihood}
            loss, found = negative_multinomial(counts, *p[:4], **sizes, **options)
        loss.backward()
        return [loss.detach(), found, *[x.grad for x in p if x.grad is not None]]


@dataclass(frozen=True)
class Errors:
    """Worst gradient and worst cell of one problem in one precision, what the plain formula errs, two runs compared."""

    gradient: float
    cell: float
    plain_gradient: float
    is_repeated: bool

    def holds(self, precision: str, *, is_deep: bool) -> bool:
        """Where the plain formula itself errs by more than 1e-6 the problem amplifies rounding, and so it may here."""
        beyond = self.plain_gradient if precision == "float32" else 0.0
        amplified = 4 * max(0.0, self.plain_gradient - 1e-6) * ROUNDING[precision]
        is_exact_gradient = self.gradient <= GRADIENT_GATES[precision] + beyond + amplified
        most = CELL_GATE if is_deep or precision == "float32" else SHALLOW_CELL_GATE
        return bool(is_exact_gradient and self.cell <= most and self.is_repeated)


def kernel_errors(problem: Problem, device: torch.device, precision: str, impl: str) -> Errors:
    """Against the formulas in float64 on the same device."""
    truth = problem.run(device, dtype=torch.float64, impl="reference")
    plain = problem.run(device, impl="reference")
    found, again = (problem.run(device, impl=impl, precision=precision) for _ in range(2))

    def apart(these: list[Tensor]) -> float:
        pairs = [(f.double(), t) for f, t in zip(these[2:], truth[2:], strict=True) if t.numel()]
        return max((float((f - t).norm() / t.norm().clamp(min=1e-12)) for f, t in pairs), default=0.0)

    cells = (
        (found[1] - truth[1]).abs().max() / truth[1].abs().max().clamp(min=1e-12) if len(truth[1]) else torch.zeros(())
    )
    repeated = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return Errors(apart(found), float(cells), apart(plain), repeated)


def step_errors(shape: Shape, cells: int, device: torch.device, impl: str, **options: Any) -> dict[str, float]:
    """A step against the CPU's kernels: loss, worst gradient of its largest value, bits of noise that differ."""
    cpu = torch.device("cpu")
    results = []
    for where, kernels in ((cpu, "auto"), (device, impl)):
        model = make_model(shape, where, impl=kernels, **options)
        minibatch = make_minibatch(cells, shape, cpu).to(where)
        objective = model(minibatch, step=3, seed=1, kl_weight=0.5, cell_weight=1 / cells)
        objective.loss.backward()
        bits = hash_bits(seed=1, step=3, place=minibatch.place, layer="z", units=20)
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results.append((objective.loss.item(), gradients, bits.cpu()))
    (loss, gradients, bits), (own_loss, own, own_bits) = results
    worst = max(float((own[n] - g).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in gradients.items())
    return {"loss": abs(own_loss - loss) / abs(loss), "gradient": worst, "bits": int((bits != own_bits).sum())}


class Repeated:
    """The same minibatches over and over, already on the device: what a trainer reads where the loader is left out."""

    def __init__(self, minibatches: list[Minibatch]) -> None:
        self.minibatches, self.waited_seconds = minibatches, 0.0
        self.steps_per_epoch, self.num_cells = 10**9, 10**9

    def __iter__(self) -> Any:
        while True:
            yield from self.minibatches

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def make_trainer(model: Liam, minibatches: list[Minibatch], device: torch.device, folder: Any) -> Trainer:
    """The trainer as the command makes it, without its loader."""
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.register_step_post_hook(lambda *_: model.keep_gradients())
    model.train()
    return Trainer(
        model,
        optimizer,
        train=Repeated(minibatches),
        validation=None,
        world=World(device=device),
        config=TrainingConfig(),
        kl=KLSchedule("steps", 1000, 1e-3),
        max_epochs=1,
        seed=0,
        directory=folder,
        history=History(None),
    )


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(call: Callable[[], Any], device: torch.device, *, calls: int, rounds: int = 5) -> float:
    """Median over rounds."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        wait_for(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait_for(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def step_seconds(
    shape: Shape, cells: int, device: torch.device, folder: Any, *, calls: int = 20, **options: Any
) -> float:
    """A training step on four minibatches that are on the device."""
    model = make_model(shape, device, **options)
    trainer = make_trainer(model, [make_minibatch(cells, shape, device, seed=s) for s in range(4)], device, folder)
    minibatches = iter(trainer.train_source)
    return seconds_a_call(lambda: trainer.step(next(minibatches)), device, calls=calls)


def likelihood_seconds(
    cells: int, features: int, found: int, device: torch.device, precision: str, **options: Any
) -> float:
    """The multinomial's loss and gradients alone."""
    problem = Problem("per-cell", cells, features, found, 128, 100.0)
    counts, inputs, weights, _ = problem.given(device)
    p = [x.requires_grad_() for x in inputs]

    def call() -> None:
        sizes = {"library": p[4], "library_weight": p[5]}
        loss, _ = negative_multinomial(counts, *p[:4], cell_weight=weights, precision=precision, **sizes, **options)
        torch.autograd.grad(loss, p)

    return seconds_a_call(call, device, calls=10)


def profile_steps(trainer: Trainer, steps: int) -> tuple[dict[str, tuple[int, float]], int]:
    """Launches and milliseconds of each kernel (on the CPU: operator) in some steps, and pageable copies."""
    device = trainer.world.device
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, *([activity.CUDA] if device.type == "cuda" else [])]
    minibatches = iter(trainer.train_source)
    trainer.step(next(minibatches))
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            trainer.step(next(minibatches))
        wait_for(device)
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    found: dict[str, tuple[int, float]] = {}
    for event in profiler.events() or []:
        if event.device_type != wanted:
            continue
        count, spent = found.get(event.name, (0, 0.0))
        duration = event.device_time_total if device.type == "cuda" else event.self_cpu_time_total
        found[event.name] = count + 1, spent + duration / 1e3
    return found, sum(count for name, (count, _) in found.items() if "Pageable" in name)


def peak_growth(trainer: Trainer, *, steps: int, after: int) -> tuple[int, int, int]:
    """Peak bytes over the first `after` steps, over all, and reserved but not allocated at the end."""
    device, minibatches = trainer.world.device, iter(trainer.train_source)
    peaks = []
    for count in (after, steps - after):
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(count):
            trainer.step(next(minibatches))
        peaks.append(torch.cuda.max_memory_allocated(device))
    return peaks[0], max(peaks), torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
