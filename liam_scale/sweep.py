"""Sweep: `liam-scale sweep atlas.zarr --out sweeps/a --alpha 1 5 25 100 --batch-key replicate --label-key cell_type`.

Every run is one ordinary training command in `OUT/runs/NAME`, with its log beside it; each is embedded and evaluated,
and together they make `sweep.csv` (a row a run), `ranks.csv`, `sweep.html` and a recommendation. The same command again
goes on where it was: what is finished is not done again.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro

from liam_scale import launching
from liam_scale.command import Answer, Command
from liam_scale.embed import EmbedConfig, embed_store
from liam_scale.evaluate import EvaluateConfig, evaluate
from liam_scale.evaluation import plots, report
from liam_scale.evaluation.cells import read_column
from liam_scale.evaluation.measures import MEASURES, require_extra
from liam_scale.evaluation.recommendation import CONFIGURATION, Recommendation, columns_of, ranks, recommend, summarised
from liam_scale.finding import open_stores, seen_by, stores_of
from liam_scale.model.config import ModelName
from liam_scale.run import RunDirectory
from liam_scale.tables import to_toml
from loaders.durable import Held, holding, write_text
from loaders.modalities import declared
from loaders.options import Range, check_options
from loaders.sizing import num_cores
from loaders.stores import Store, choose


@dataclass(frozen=True)
class SweepConfig:
    """Train with several alphas, covariates and seeds; score all runs, and recommend an alpha or say why not."""

    store: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STORE ...")]
    """Store to train on, or several that are chained as one data set."""
    out: Path
    """Folder of the sweep."""
    batch_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns to remove, one after the other: each gets runs of its own; `site+donor` are removed at once."""
    alpha: Annotated[tuple[float, ...], tyro.conf.arg(metavar="ALPHA ...")] = (1.0, 5.0, 25.0, 100.0)
    """Weights of the adversary."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED ...")] = (0, 1, 2)
    """Seeds of the runs of each configuration; what lies within their spread is no difference."""
    model: tuple[ModelName, ...] = ("bavae",)
    """Models of the paper, one after the other."""
    label_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns with labels, such as cell types: without them nothing says what mixing costs."""
    keep_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns whose mixing should not rise, such as condition."""
    modality: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=NM|NB ...")] = ()
    """What modalities of other names are where no ingest has said it, as for the training command."""
    options: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """TOML file with options of the training command for all runs, such as config.toml of a run."""
    max_epochs: Annotated[int | None, Range(least=1)] = None
    """Epochs of every run; default: as the training command."""
    ranks: Annotated[int, Range(least=1)] = 1
    """Processes that train one run together."""
    jobs: Annotated[int, Range(least=1)] = 1
    """Runs trained at the same time; each takes its share of the cores, and one of CUDA_VISIBLE_DEVICES."""
    slurm: bool = False
    """Write the runs as an array job for sbatch and train nothing here; then the same command without --slurm."""
    max_cells: Annotated[int, Range(least=3)] = 20_000
    """Score at most so many cells at once."""
    scib: Literal["quick", "all"] = "quick"
    """Measures of scib-metrics; quick: those that take seconds, all: also BRAS and kBET."""
    plots: bool = True
    """Draw UMAPs of every run."""

    def __post_init__(self) -> None:
        for name in ("batch_key", "label_key", "keep_key"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        check_options(self)
        for name in ("store", "batch_key", "alpha", "seeds", "model"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')}: got none; give at least one")
        for option, least in (("alpha", 0.0), ("seeds", 0)):
            if min(getattr(self, option)) < least:
                raise ValueError(f"--{option}: got {min(getattr(self, option)):g}; give at least 0")
        if both := sorted({*self.columns} & {*self.keep_key}):
            raise ValueError(f"--keep-key: got {', '.join(both)}, which --batch-key removes; name other columns")

    @property
    def columns(self) -> tuple[str, ...]:
        """Obs columns that any run removes."""
        return tuple(dict.fromkeys(column for key in self.batch_key for column in columns_of(key)))


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    model: str
    batch_key: str
    alpha: float
    seed: int
    folder: Path
    command: tuple[str, ...]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def embedding(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.zarr")

    @property
    def scores(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-evaluation")

    def __str__(self) -> str:
        return f"{self.model}, {self.batch_key}, alpha {self.alpha:g}, seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """What a sweep found: `table` (a row a run), `ranks` (a row a configuration), and what it recommends."""

    table: pd.DataFrame
    ranks: pd.DataFrame
    recommendation: Recommendation
    written: tuple[Path, ...]


def sweep(config: SweepConfig) -> Sweep | None:
    """Train, embed and evaluate every run that is not finished; compare all.

    Returns
    -------
    What was found; None where `slurm` only wrote the array job.

    Raises
    ------
    ValueError
        An option names what is not there, or the folder holds a sweep of other data or training options.
    RuntimeError
        A run failed; the message names it and its log.
    """
    require_extra()
    members, store = members_of(config), open_stores(config.store, declared(config.modality))
    _check_columns(config, store)
    with holding(config.out):
        _settle(config)
        waiting = [one for one in members if not RunDirectory(one.folder).is_finished]
        if config.slurm:
            _write_array(config, waiting)
            return None
        _train(waiting, config, len(members) - len(waiting))
        rows = []
        for number, one in enumerate(members, start=1):
            print(f"[{number}/{len(members)}] scoring {one}", flush=True)
            rows.append(_scored(one, config, store))
        return _write(pd.DataFrame(rows), config, members)


def members_of(config: SweepConfig) -> list[Member]:
    """Every run of the sweep, in the order of its table."""
    start = launching.ranks(config.ranks) if config.ranks > 1 else [*launching.python(), "-m"]
    members = []
    for model, key, alpha, seed in itertools.product(config.model, config.batch_key, config.alpha, config.seeds):
        folder = config.out / "runs" / f"{model}-{key.replace('/', '_')}-alpha{alpha:g}-seed{seed}"
        command = [*start, "liam_scale.train", *config.store, "--out", str(folder), "--batch-key", *columns_of(key)]
        command += ["--model", model, "--alpha", f"{alpha:g}", "--seed", str(seed)]
        command += ["--modality", *config.modality] if config.modality else []
        command += [] if config.options is None else ["--config", str(config.options)]
        command += [] if config.max_epochs is None else ["--max-epochs", str(config.max_epochs)]
        members.append(Member(model, key, alpha, seed, folder, tuple(command)))
    return members


def _check_columns(config: SweepConfig, store: Store) -> None:
    """Refuse a column that is not there before hours of training, not after."""
    for option, keys in (("batch", config.columns), ("label", config.label_key), ("keep", config.keep_key)):
        for key in keys:
            read_column(store, key, option=f"--{option}-key")


def _settle(config: SweepConfig) -> None:
    """Keep what all runs of a sweep have in common; a sweep may grow by alphas, seeds, models and columns."""
    fixed = {"store": list(config.store), "ranks": config.ranks, "max_epochs": config.max_epochs or 0}
    fixed |= {"modality": list(config.modality)} if config.modality else {}
    fixed["options"] = "" if config.options is None else config.options.read_text(encoding="utf-8")
    file, wanted = config.out / "sweep.toml", to_toml(fixed)
    if file.exists() and file.read_text(encoding="utf-8") != wanted:
        raise ValueError(
            f"--out: {config.out} holds a sweep with another store, --options, --max-epochs or --ranks (see {file});"
            " give the same, or name a new folder"
        )
    (config.out / "runs").mkdir(parents=True, exist_ok=True)
    write_text(file, wanted)


def _train(waiting: Sequence[Member], config: SweepConfig, num_finished: int) -> None:
    """Run the training commands, `jobs` at a time."""
    if num_finished:
        print(f"{num_finished} of {num_finished + len(waiting)} runs are finished", flush=True)
    left, failed = list(waiting), []
    held: set[Member] = set()
    running: dict[subprocess.Popen[bytes], tuple[Member, int, float]] = {}
    free = list(range(config.jobs))
    with launching.none_outlives_this(running) as wait:
        while left or running:
            while free and (one := _next_free(left, held)) is not None:
                place = free.pop(0)
                running[_start(one, place, config)] = (one, place, time.monotonic())
            wait(0.1 if running else 1.0)
            for process in [p for p in running if p.poll() is not None]:
                one, place, began = running.pop(process)
                free.append(place)
                is_finished = RunDirectory(one.folder).is_finished
                if not is_finished and _holder(one) is not None:  # Another one had only just started.
                    left.append(one)
                    continue
                done = f"{time.monotonic() - began:.0f} s" if is_finished else f"not finished, see {one.log}"
                print(f"trained {one}: {done}; {len(left) + len(running)} to go", flush=True)
                failed += [] if is_finished else [one]
    if failed:
        said = failed[0].log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(
            f"sweep: {len(failed)} of {len(waiting)} runs did not finish; {failed[0].log} ends with\n  "
            + "\n  ".join(said)
            + "\nthe same command goes on with what is missing"
        )


def _start(one: Member, place: int, config: SweepConfig) -> subprocess.Popen[bytes]:
    environment = launching.environment(max(1, num_cores() // (config.jobs * config.ranks)))
    if (devices := environment.get("CUDA_VISIBLE_DEVICES", "").split(",")) != [""] and config.jobs > 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    print(f"$ {shlex.join(one.command)}", flush=True)
    with one.log.open("ab") as log:
        return subprocess.Popen(one.command, stdout=log, stderr=log, env=environment)


def _next_free(left: list[Member], held: set[Member]) -> Member | None:
    """Take the first run that nobody trains. A sweep that was killed leaves its trainings at work: they may finish."""
    for one in left:
        if (holder := _holder(one)) is None:
            left.remove(one)
            return one
        if one not in held:
            print(f"waiting for {one}: {holder}", flush=True)
        held.add(one)
    return None


def _holder(one: Member) -> str | None:
    """Who trains a run now, in words."""
    try:
        with holding(one.folder):
            return None
    except Held as error:
        return str(error)


def _scored(one: Member, config: SweepConfig, store: Store) -> dict[str, object]:
    """The row of a run: its embedding is made and evaluated where that has not been done with these options."""
    directory = RunDirectory(one.folder)
    record = directory.record()
    # Counts of a layer (of --options) are found as the run found them.
    store = stores_of(directory) if record.layer else seen_by(directory, choose(store, where=record.where))
    if not one.embedding.exists():
        embed_store(EmbedConfig(run=one.folder, store=config.store, out=one.embedding), store)
    keys = dict.fromkeys((*columns_of(one.batch_key), *config.columns, *config.keep_key))
    asked = EvaluateConfig(
        config.store[0],
        embedding_file=str(one.embedding),
        batch_key=tuple(keys),
        label_key=config.label_key,
        out=one.scores,
        run=one.folder,
        max_cells=config.max_cells,
        baseline=False,
        scib=config.scib,
        plots=config.plots,
    )
    file, wanted = one.scores / "options.toml", to_toml(asked)
    if not file.exists() or file.read_text(encoding="utf-8") != wanted:
        file.unlink(missing_ok=True)  # Killed from here on, scores are not taken for those of the options before.
        evaluate(asked, data=store)
        write_text(file, wanted)
    found = pd.read_csv(one.scores / "metrics.csv")
    scores = {f"{key}:{of}": value for key, of, value in found[["measure", "of", "X_liam"]].itertuples(index=False)}
    ending = dict(record.ending or {})
    row = {"model": one.model, "batch_key": one.batch_key, "alpha": one.alpha, "seed": one.seed}
    return row | {"best_epoch": ending.get("best_epoch")} | scores


def _write(table: pd.DataFrame, config: SweepConfig, members: Sequence[Member]) -> Sweep:
    """The tables, the curves, the report."""
    better = {key: measure.better for key, measure in MEASURES.items()}
    ranked = ranks(table, better=better, keep=config.keep_key)
    found = recommend(table, keep=config.keep_key)
    summary = summarised(table, keep=config.keep_key)
    files = {name: config.out / name for name in ("sweep.csv", "ranks.csv", "sweep.png", "sweep.html")}
    write_text(files["sweep.csv"], table.to_csv(index=False))
    write_text(files["ranks.csv"], ranked.to_csv())
    plots.draw_curves(files["sweep.png"], summary, keep=" and ".join(config.keep_key), chosen=found.alpha)
    first = config.seeds[0]
    shown = ranked.set_axis([f"{m}, {key}, alpha {a:g}" for m, key, a in ranked.index]).T.rename_axis("mean rank")
    runs = table.drop(columns=[*CONFIGURATION, "seed"]).set_axis([str(one) for one in members]).T.rename_axis("measure")
    report.write_report(
        files["sweep.html"],
        title=f"Sweep of {', '.join(Path(uri).name for uri in config.store)}",
        sections={
            "": [report.text(str(found), lead=True)],
            "Mixing, what is kept, and biology against alpha": [report.picture(files["sweep.png"], "curves")],
            "Ranks (1 is best)": [
                report.text("Mean rank over the measures of removal and of conservation; overall is their mean."),
                report.table(shown, best=report.best_in_rows(shown, ["lower"] * len(shown)), digits=1),
            ],
            "Runs": [report.table(runs)],
            "UMAP, first seed": [
                piece
                for one in members
                if one.seed == first and (one.scores / "umap.png").exists()
                for piece in (report.text(str(one)), report.picture(one.scores / "umap.png", str(one)))
            ],
            "Training command of the first run": [report.code(shlex.join(members[0].command))],
        },
    )
    return Sweep(table, ranked, found, tuple(files.values()))


def _script(config: SweepConfig) -> Path:
    return config.out / "sweep.sbatch"


def _write_array(config: SweepConfig, waiting: Sequence[Member]) -> None:
    if not waiting:
        print("all runs are finished: the same command without --slurm embeds, scores and compares them")
        return
    commands, script = config.out / "commands.txt", _script(config)
    write_text(commands, "".join(f"{shlex.join(one.command)}\n" for one in waiting))
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name=sweep --array=1-{len(waiting)} --signal=USR1@120 --requeue",
        f"#SBATCH --ntasks=1 --output={shlex.quote(str(config.out / 'runs' / 'slurm-%A_%a.log'))}",
        f"cd {shlex.quote(os.getcwd())}",
        f'exec bash -c "exec $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(commands))})"',
    ]
    write_text(script, "\n".join(lines) + "\n")
    print(f"{len(waiting)} runs are to be trained: sbatch {script}")
    print("then the same command without --slurm embeds, scores and compares them")


def _sweep(config: SweepConfig) -> Answer:
    found = sweep(config)
    if found is None:
        waiting = [one for one in members_of(config) if not RunDirectory(one.folder).is_finished]
        return Answer("", {"waiting": len(waiting), "script": _script(config) if waiting else None})
    table = found.ranks[["overall", "removal", "conservation"]].round(1).to_string()
    text = "\n".join([table, str(found.recommendation), *(f"wrote {path}" for path in found.written)])
    recommended = {**vars(found.recommendation), "text": str(found.recommendation)}
    tables = {"runs": found.table, "ranks": found.ranks.reset_index()}
    return Answer(text, {**tables, "recommendation": recommended, "written": found.written})


main = Command(
    SweepConfig,
    _sweep,
    prog="liam-scale sweep",
    description="Train with several alphas, covariates and seeds; score and compare.",
    answers=True,
)

if __name__ == "__main__":
    sys.exit(main())
