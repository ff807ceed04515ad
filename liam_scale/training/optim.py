"""Adam, the schedule of the KL weight, and the number of epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from liam_scale.training.distributed import World
from liam_scale.training.half_adam import HalfAdam
from liam_scale.training.shared_adam import SharedAdam, share_memory
from loaders.options import Range, check_options

STEPS_OF_PUBLISHED_EPOCH = 464
"""Steps of an epoch of the published data: 0.95 x 62,501 training cells in minibatches of 128."""

CELLS_FOR_STEP_WARMUP = 100_000
"""Above this many cells the KL weight grows by steps: an epoch there is too long a unit."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam as the original sets it."""

    lr: Annotated[float, Range(least=0), tyro.conf.arg(aliases=["--lr"])] = 1e-3
    """Learning rate."""
    eps: Annotated[float, Range(above=0)] = 0.01
    """Added to the root of Adam's second moment."""
    weight_decay: Annotated[float, Range(least=0)] = 1e-6
    """L2 penalty, in the gradient."""
    shard: bool = True
    """Ranks on the CPUs of one machine share weights and moments, and each updates its part."""
    moments: Literal["float32", "bf16"] = "float32"
    """Type in which Adam's moments are kept; bf16 halves their bytes, rounds at random, and leaves `shard` out."""
    reduce_bf16: bool = False
    """Other ranks average gradients in bfloat16, half of the bytes between GPUs and machines."""
    kl_warmup: Literal["auto", "epochs", "steps"] = "auto"
    """Unit in which the weight of KL(z) grows; auto: epochs up to 100,000 cells, steps above."""
    kl_warmup_epochs: Annotated[int, Range(least=0)] = 400
    """Epochs after which the weight of KL(z) is 1; in steps an epoch counts 464, as in the published runs."""
    kl_weight_min: Annotated[float, Range(least=0, most=1)] = 1e-3
    """Smallest weight of KL(z)."""

    def __post_init__(self) -> None:
        check_options(self, "--optim.")


@dataclass(frozen=True)
class KLSchedule:
    """Weight of KL(z) as a function of the position, max(min, min(1, done / warm-up))."""

    unit: Literal["epochs", "steps"]
    warmup: float
    """Length of the warm-up in that unit."""
    minimum: float

    def __call__(self, epoch: int, global_step: int) -> float:
        done = epoch if self.unit == "epochs" else global_step
        return max(self.minimum, min(1.0, done / self.warmup if self.warmup > 0 else 1.0))


def kl_schedule(config: OptimConfig, *, num_cells: int) -> KLSchedule:
    """The schedule for a data set of `num_cells` cells."""
    unit = config.kl_warmup
    if unit == "auto":
        unit = "steps" if num_cells > CELLS_FOR_STEP_WARMUP else "epochs"
    length = config.kl_warmup_epochs * (STEPS_OF_PUBLISHED_EPOCH if unit == "steps" else 1)
    return KLSchedule("steps" if unit == "steps" else "epochs", length, config.kl_weight_min)


def default_max_epochs(num_cells: int) -> int:
    """The original's heuristic, min(round(20,000 / n x 400), 400), and at least 1."""
    return max(1, min(round(20_000 / max(1, num_cells) * 400), 400))


def build_optimizer(model: nn.Module, config: OptimConfig, world: World | None = None) -> torch.optim.Optimizer:
    """Fused Adam: 0.025 against 0.21 CPU seconds a step for 25.6 M parameters. Ranks that can share it out."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.moments == "bf16":
        return HalfAdam(parameters, **options)
    memory = share_memory(parameters, world) if config.shard and world is not None else None
    if world is not None and memory is not None:
        return SharedAdam(parameters, memory, world, **options)
    # what a recorded step needs: torch then takes nothing of Adam from the host but constants
    is_capturable = parameters[0].device.type != "cpu"
    return torch.optim.Adam(parameters, **options, fused=True, capturable=is_capturable)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments under `<parameter name>/<moment>`, for a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the moments of a checkpoint back, one after the other."""
    parameters = dict(model.named_parameters())

    def put(name: str, moment: str, value: Tensor) -> None:
        state = optimizer.state[parameters[name]]
        if moment in state:  # memory that ranks share, or bfloat16
            state[moment].copy_(value)
        else:
            # Fused Adam wants its step count beside the parameter, as float32, as are its moments.
            state[moment] = value.to(parameters[name].device, torch.float32)

    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        library = f"{name.removesuffix('weight')}library_weight"
        # In older checkpoints the moments of a `library_weight` are the last column of the `weight`'s.
        if library in parameters and f"{library}/{moment}" not in tensors:
            last = value[:, -1].contiguous() if value.dim() else value.clone()
            put(library, moment, last)
            value = value[:, :-1].contiguous() if value.dim() else value
        put(name, moment, value)
