"""Embedding of a cell: the quadrature against the original's 5,000 random draws, seconds and errors.

python benchmarks/embed.py [--cells 4096] [--latent 20] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from liam_scale.model import logistic_normal_mean

DRAWS = 5_000
REPEATS = 3
CHUNK = 128


def monte_carlo(mean: Tensor, variance: Tensor, *, draws: int, generator: torch.Generator) -> Tensor:
    """The original's way: the mean of the softmax of random draws."""
    total = torch.zeros_like(mean)
    for start in range(0, draws, 250):
        size = (min(250, draws - start), *mean.shape)
        noise = torch.randn(size, generator=generator, dtype=mean.dtype)
        total += torch.softmax(mean + variance.sqrt() * noise, dim=-1).sum(dim=0)
    return total / draws


def fine(mean: Tensor, variance: Tensor) -> Tensor:
    """The same integral with spacings several times finer, in float64: the truth, to about 1e-7."""
    mean, deviation = mean.double(), variance.double().sqrt()
    nodes = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)
    weights = torch.exp(-0.5 * nodes**2) / torch.exp(-0.5 * nodes**2).sum()
    low = (mean - 6 * deviation).amax(dim=1) - 4.0
    high = (mean + 6 * deviation).amax(dim=1) + 20.0
    points = low[:, None] + torch.linspace(0.0, 1.0, 241, dtype=torch.float64) * (high - low)[:, None]
    distribution = torch.zeros(*points.shape, mean.shape[1], dtype=torch.float64)
    density = torch.zeros_like(distribution)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        rate = torch.exp((mean + deviation * node)[:, None, :] - points[:, :, None])
        below = torch.exp(-rate)
        distribution += weight * below
        density += weight * rate * below
    distribution.clamp_(min=1e-300)
    product = torch.exp(torch.log(distribution).sum(dim=2, keepdim=True))
    total = (density / distribution * product).sum(dim=1)
    return total / total.sum(dim=1, keepdim=True)


def seconds(function: Callable[[], object]) -> float:
    """Median of some runs after one to warm up."""
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def posteriors(cells: int, latent: int) -> tuple[Tensor, Tensor]:
    """Means and variances as a trained model has them: most dimensions near the prior, some sharp."""
    generator = torch.Generator().manual_seed(0)
    mean = 1.5 * torch.randn(cells, latent, generator=generator)
    variance = 0.01 + torch.rand(cells, latent, generator=generator)
    return mean, variance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=4096)
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    mean, variance = posteriors(options.cells, options.latent)
    generator = torch.Generator().manual_seed(1)
    few = slice(0, CHUNK)

    def draw() -> Tensor:
        return monte_carlo(mean[few], variance[few], draws=DRAWS, generator=generator)

    quadrature = seconds(lambda: logistic_normal_mean(mean, variance)) / options.cells
    drawn = seconds(draw) / CHUNK
    exact = fine(mean[few], variance[few])
    many = monte_carlo(mean[few].double(), variance[few].double(), draws=200_000, generator=generator)
    error_drawn = float((draw() - exact).abs().max())
    error_many = float((many - exact).abs().max())
    print(f"{options.cells} cells x {options.latent} dimensions, {options.threads} thread(s), float32")
    print("| method | microseconds a cell | cells/s | largest error |")
    print("| --- | --- | --- | --- |")
    print(f"| {DRAWS} draws (original) | {1e6 * drawn:.1f} | {1 / drawn:,.0f} | {error_drawn:.1e} |")
    print(f"| 200,000 draws, float64 | | | {error_many:.1e} |")
    error = float((logistic_normal_mean(mean[few], variance[few]) - exact).abs().max())
    print(f"| quadrature | {1e6 * quadrature:.1f} | {1 / quadrature:,.0f} | {error:.1e} |")
    print(f"speed: {drawn / quadrature:.0f}x")


if __name__ == "__main__":
    main()
