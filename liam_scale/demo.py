"""Demo: `liam-scale demo` runs every step on a small data set that comes with the package, and shows the commands."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

import tyro

from liam_scale import launching
from liam_scale.command import Command
from loaders.options import Range, check_options

SIMULATION = (
    "num_cells=3000, num_genes=2000, num_peaks=8000, num_samples=3, num_types=12, genes_per_cell=120, "
    "peaks_per_cell=300, sample_effect=0.8"
)
"""What `--multiome` simulates, of 2,000 genes and 8,000 peaks in 3 samples: shallow cells and samples so different that
k-means on principal components finds the samples (NMI with the types 0.5)."""

MOSAIC_EPOCHS, MULTIOME_EPOCHS = 200, 40
"""Epochs after which a demo stops: the measures have settled, and two cores are done within three minutes."""

_RESULTS = ("report.html", "metrics.csv", "umap.png", "loss.png")


@dataclass(frozen=True)
class DemoConfig:
    """Ingest, train, embed and evaluate a small data set with the commands that one would use on one's own."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("liam-demo")
    """Folder for everything the demo makes. A demo that was interrupted goes on when started again."""
    multiome: bool = False
    """Simulated RNA + ATAC, whose cell types are known, instead of the CITE-seq mosaic of human blood cells."""
    ranks: Annotated[int, Range(least=1)] = 2
    """Processes that train together."""
    max_epochs: Annotated[int | None, Range(least=1)] = None
    """Train at most so many epochs; default: 200, or 40 with --multiome."""

    def __post_init__(self) -> None:
        check_options(self, "--")


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    title: str
    command: tuple[str, ...]
    makes: Path | None = None
    """What the command makes; where it is there already, the step is left out."""


def demo(config: DemoConfig) -> None:
    """Run every step, printing its command first.

    Raises
    ------
    ValueError
        The folder holds what no such demo wrote.
    RuntimeError
        A command failed.
    """
    _check_folder(config)
    config.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    steps = demo_steps(config)
    for number, step in enumerate(steps, start=1):
        _run_step(step, f"[{number}/{len(steps)}]")
    pictures = [str(config.out / name) for name in _RESULTS if (config.out / name).exists()]
    print(f"\nDone in {time.monotonic() - began:.0f} s. Look at {', '.join(pictures)}.")
    reader = f'liam_scale.read_store("{_store(config)}")'
    print(
        f'The embedding is obsm["X_liam"] of {reader}; scanpy.pp.neighbors(adata, use_rep="X_liam") goes on from there.'
    )


def demo_steps(config: DemoConfig) -> list[Step]:
    """The commands of the demo in their order, as a user would type them."""
    store, trained = _store(config), config.out / "run"
    ranks = launching.ranks(config.ranks)
    source, steps = _source(config)
    sample_key = "sample" if config.multiome else "donor"
    epochs = config.max_epochs or (MULTIOME_EPOCHS if config.multiome else MOSAIC_EPOCHS)
    # Ten epochs of patience are 120 steps here, and 80 validation cells a noisy judge.
    training = ["--max-epochs", epochs, "--training.patience", 50]
    columns, quick = ["--batch-key", "donor", "--label-key", "cell_type"], ["--scib", "quick"]
    commands = {
        "Ingest: source file -> one shuffled, checked store": [
            *(*launching.liam_scale(), "ingest", source, "--sample-key", sample_key, "--out", store)
        ],
        f"Train: {config.ranks} processes, samples are the donors": [
            *(*ranks, "liam_scale.train", store, "--batch-key", "donor", "--out", trained, *training)
        ],
        "Embed: one vector per cell into the store": [*ranks, "liam_scale.embed", trained],
        "Evaluate: before (PCA) and after": [
            *(*launching.liam_scale(), "evaluate", store, *columns, "--out", config.out, "--run", trained, *quick)
        ],
    }
    makes = [store, trained / "model.safetensors", None, None]
    for (title, command), made in zip(commands.items(), makes, strict=True):
        steps.append(Step(title, tuple(map(str, command)), made))
    return steps


def _source(config: DemoConfig) -> tuple[Path, list[Step]]:
    """The source file, and the step that makes it where it does not come with the package."""
    if not config.multiome:
        return Path(str(resources.files("liam_scale") / "data" / "pbmc_mosaic.h5mu")), []
    file = config.out / "multiome.h5mu"
    code = (
        f"from loaders.synthetic import simulate_mudata; simulate_mudata({SIMULATION}).write({json.dumps(str(file))})"
    )
    # mudata announces on every write how it will behave one day; here it makes no difference.
    quiet = (*launching.python(), "-W", "ignore::FutureWarning")
    return file, [Step("Simulate: RNA + ATAC with known cell types", (*quiet, "-c", code), file)]


def _store(config: DemoConfig) -> Path:
    return config.out / ("multiome.zarr" if config.multiome else "pbmc.zarr")


def _check_folder(config: DemoConfig) -> None:
    if not config.out.exists():
        return
    if not config.out.is_dir():
        raise ValueError(f"OUT: got {config.out}, which is a file; name a folder that does not exist yet")
    ours = {_store(config).name, "run", *_RESULTS} | ({"multiome.h5mu"} if config.multiome else set())
    others = sorted(path.name for path in config.out.iterdir() if path.name not in ours and path.name[0] != ".")
    if others:
        listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise ValueError(
            f"OUT: got {config.out}, which holds {listed}, not written by this demo;"
            f" name a new folder: liam-scale demo NAME{' --multiome' if config.multiome else ''}"
        )


def _run_step(step: Step, number: str) -> None:
    shown = shlex.join(step.command)
    print(f"\n{number} {step.title}\n$ {shown}", flush=True)
    if step.makes is not None and step.makes.exists():
        print(f"  left out: {step.makes} is there from an earlier demo", flush=True)
        return
    began = time.monotonic()
    started: list[subprocess.Popen[bytes]] = []
    with launching.none_outlives_this(started) as wait:
        started.append(process := subprocess.Popen(step.command, env=launching.environment()))
        while process.poll() is None:
            wait(0.05)
    if process.returncode != 0:
        raise RuntimeError(
            f"demo: the command above ended with exit code {process.returncode}; its own message says why."
            " Started again, the demo goes on at this step"
        )
    print(f"  {time.monotonic() - began:.0f} s", flush=True)


main = Command(
    DemoConfig,
    demo,
    prog="liam-scale demo",
    description="All of it on a small data set that comes with the package.",
)

if __name__ == "__main__":
    sys.exit(main())
