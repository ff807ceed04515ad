"""A training step end to end against MultiVI of scvi-tools and dense minibatches, and as features and cells grow.

    python benchmarks/step.py --peer-python scvi/bin/python       # a virtual environment with scvi-tools 1.4.2
    python benchmarks/step.py --only scaling | parts | peers

The shape is the paper's: 13,431 genes x 116,490 peaks, about 800 + 3,600 non-zeros a cell, 13 samples. liam-scale
streams from a store, loader included; MultiVI holds the same cells in memory. CPU seconds count all threads.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness import ROOT, Peer, describe_machine, quartiles, serve, spread, table, take_turns

GENES, PEAKS, SAMPLES = 13_431, 116_490, 13


def make_store(folder: Path, num_cells: int) -> Path:
    from loaders.synthetic import simulate

    path = folder / f"paper-{num_cells}.zarr"
    if not path.exists():
        simulate(path, num_cells=num_cells, num_genes=GENES, num_peaks=PEAKS, num_samples=SAMPLES)
    return path


def serve_liam(store: str, minibatch: int, steps: int, impl: str, precision: str, with_parts: bool) -> None:
    """liam-scale as it trains: the trainer's own step on minibatches of the loader."""
    from liam_scale.config import TrainConfig
    from liam_scale.finding import open_stores
    from liam_scale.fitting import training_loaders
    from liam_scale.model import Liam, ModelConfig
    from liam_scale.samples import model_data
    from liam_scale.training.distributed import World
    from liam_scale.training.history import History
    from liam_scale.training.optim import KLSchedule, OptimConfig, build_optimizer
    from liam_scale.training.options import TrainingConfig
    from liam_scale.training.trainer import Trainer
    from loaders.options import LoaderConfig

    opened = open_stores([store])
    config = ModelConfig(modalities=("rna", "atac"), impl=impl, precision=precision)  # type: ignore[arg-type]
    data = model_data(opened, config, ("sample",), LoaderConfig(adt_transform="none"))
    model = Liam(config, data)
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.register_step_post_hook(lambda *_: model.keep_gradients())
    options = TrainConfig(
        store=(store,),
        out=Path(tempfile.mkdtemp()),
        batch_key=("sample",),
        loader=LoaderConfig(minibatch=minibatch, streams=16, memory="512MiB"),
    )
    loader, _ = ExitStack().enter_context(training_loaders(opened, options, data, World()))
    trainer = Trainer(
        model,
        optimizer,
        train=loader,
        validation=None,
        world=World(),
        config=TrainingConfig(),
        kl=KLSchedule("steps", 1000, 1e-3),
        max_epochs=10**6,
        seed=0,
        directory=options.out,
        history=History(None),
    )
    model.train()

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    minibatches = forever()
    parts: dict[str, float] = defaultdict(float)
    if with_parts:
        time_parts(trainer, parts)

    def work() -> dict[str, Any]:
        parts.clear()
        waited, cells, start = loader.waited_seconds, 0, time.perf_counter()
        for _ in range(steps):
            minibatch = next(minibatches)
            trainer.step(minibatch)
            cells += minibatch.num_cells
        elapsed = time.perf_counter() - start
        return {"cells": cells, "waiting": (loader.waited_seconds - waited) / elapsed, "parts": dict(parts)}

    serve(work)


def time_parts(trainer: Any, parts: dict[str, float]) -> None:
    """Wrap what a step calls in clocks. Gradients of the likelihoods are formed in the forward pass."""
    import torch

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        # CPU time of this thread: with one thread it is the part's own, whatever else the machine does.
        start = time.thread_time()
        yield
        parts[name] += time.thread_time() - start

    def wrap(owner: Any, attribute: str, name: str) -> None:
        inner = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            with clock(name):
                return inner(*arguments, **options)

        setattr(owner, attribute, timed)

    model = trainer.model
    for name, encoder in model.encoders.items():
        wrap(encoder, "forward", f"forward: encoders of {name}")
    for name, decoder in model.decoders.items():
        wrap(decoder, "log_likelihood", f"forward: likelihood of {name} with its gradients")
    wrap(model, "forward", "forward, all")
    wrap(torch.Tensor, "backward", "backward of the rest")
    wrap(trainer.optimizer, "step", "optimizer")


def serve_multivi(store: str, minibatch: int, steps: int) -> None:
    """MultiVI with its defaults on cells in memory; the clock runs inside Lightning's training loop."""
    import anndata
    import lightning.pytorch as lightning
    import mudata
    import numpy as np
    import scipy.sparse
    import scvi
    import torch
    import zarr

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    num_cells = minibatch * steps
    root = zarr.open_group(store, mode="r")
    blocks = []
    for name, features in (("rna", GENES), ("atac", PEAKS)):
        matrix = root["mod"][name]["X"]
        indptr = matrix["indptr"][: num_cells + 1]
        entries = (matrix["data"][: indptr[-1]], matrix["indices"][: indptr[-1]].astype(np.int32), indptr)
        blocks.append(scipy.sparse.csr_matrix(entries, shape=(num_cells, features), dtype=np.float32))
    codes = root["obs"]["sample"]["codes"][:num_cells]
    data = mudata.MuData({name: anndata.AnnData(block) for name, block in zip(("rna", "atac"), blocks, strict=True)})
    data.obs["sample"] = np.array([f"s{code}" for code in codes])
    scvi.settings.verbosity = 50
    scvi.model.MULTIVI.setup_mudata(data, batch_key="sample", modalities={"rna_layer": "rna", "atac_layer": "atac"})
    model = scvi.model.MULTIVI(data)

    class Clock(lightning.Callback):
        wall = cpu = 0.0

        def on_train_start(self, *_: Any) -> None:
            self.wall, self.cpu = -time.perf_counter(), -time.process_time()

        def on_train_end(self, *_: Any) -> None:
            self.wall += time.perf_counter()
            self.cpu += time.process_time()

    def work() -> dict[str, Any]:
        clock = Clock()
        model.train(
            max_epochs=1,
            accelerator="cpu",
            train_size=1.0,
            batch_size=minibatch,
            early_stopping=False,
            check_val_every_n_epoch=None,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            callbacks=[clock],
        )
        return {"cells": num_cells, "wall": clock.wall, "cpu": clock.cpu}

    serve(work, versions={"scvi-tools": scvi.__version__, "torch": torch.__version__})


def compare_peers(store: Path, options: argparse.Namespace) -> None:
    """Cells a second, wall and CPU, of all peers in one run."""
    rows = []
    for threads, minibatch in ((1, 128), (1, 1024), (2, 128)):
        steps = max(2, options.steps * 128 // minibatch)
        base = [sys.executable, __file__, "--serve", "liam", "--store", str(store), "--minibatch", str(minibatch)]
        base += ["--steps", str(steps)]
        peers = [
            Peer("liam-scale float32", base, threads),
            Peer("liam-scale bf16", [*base, "--precision", "bf16"], threads),
        ]
        if minibatch == 128 and threads == 1:
            peers.append(Peer("reference, dense minibatches", [*base, "--impl", "reference"], threads))
        if options.peer_python:
            command = [options.peer_python, __file__, "--serve", "multivi", "--store", str(store)]
            peers.append(Peer("MultiVI", [*command, "--minibatch", str(minibatch), "--steps", str(steps)], threads))
        results = take_turns(peers, rounds=options.rounds)
        rates = {name: [r["cells"] / r["cpu"] for r in own] for name, own in results.items()}
        last = quartiles(rates["MultiVI"])[0] if "MultiVI" in rates else float("nan")
        for name, own in results.items():
            rows.append(
                (
                    threads,
                    minibatch,
                    name,
                    spread(rates[name]),
                    spread([r["cells"] / r["wall"] for r in own]),
                    f"{quartiles(rates[name])[0] / last:.2f}",
                    f"{max(r['peak_rss_mb'] for r in own):,.0f}",
                    f"{quartiles([r['waiting'] for r in own])[0]:.1%}" if "waiting" in own[0] else "",
                )
            )
    header = ("threads", "minibatch", "what", "cells / CPU s", "cells / s", "x MultiVI (CPU)", "peak RSS MB", "waiting")
    print(table(header, rows))


def show_parts(store: Path, options: argparse.Namespace) -> None:
    """Where the time of a step goes."""
    base = [sys.executable, __file__, "--serve", "liam", "--store", str(store), "--steps", str(options.steps)]
    for name, extra in (("float32", []), ("bf16", ["--precision", "bf16"])):
        peer = Peer(name, [*base, "--minibatch", "128", "--with-parts", *extra])
        results = take_turns([peer], rounds=max(3, options.rounds // 2))[name]
        keys = list(results[0]["parts"])
        rows = [(key, spread([r["parts"][key] / options.steps * 1e3 for r in results])) for key in keys]
        rows.append(("whole step, loader threads included", spread([r["cpu"] / options.steps * 1e3 for r in results])))
        rows.append(
            ("waiting for data, wall", spread([r["waiting"] * r["wall"] / options.steps * 1e3 for r in results]))
        )
        print(f"\n{name}, one thread, minibatch 128\n")
        print(table(("part of a step", "CPU ms"), rows))


def show_scaling(options: argparse.Namespace) -> None:
    """Cost of a step as features and minibatch grow, on minibatches in memory."""
    import numpy as np
    import scipy.sparse
    import torch

    from liam_scale.model import Liam, ModelConfig, ModelData
    from liam_scale.training.optim import OptimConfig, build_optimizer
    from loaders.minibatch import Minibatch, SparseCounts

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows = []
    for features in (10_000, 100_000, 1_000_000):
        model = Liam(ModelConfig(), ModelData({"atac": features}, ("a", "b")))
        optimizer = build_optimizer(model, OptimConfig())
        optimizer.register_step_post_hook(lambda *_, model=model: model.keep_gradients())
        for cells in (64, 256, 1_024, 4_096):
            per_cell = features // 30
            if cells * features > 1.1e9 and options.quick:
                continue
            columns = np.sort(rng.integers(0, features, (cells, per_cell)), axis=1).ravel()
            entries = (np.ones(cells * per_cell, np.float32), columns, np.arange(cells + 1) * per_cell)
            matrix = scipy.sparse.csr_matrix(entries, shape=(cells, features))
            matrix.sum_duplicates()
            place = torch.arange(cells)
            minibatch = Minibatch(
                {"atac": SparseCounts.from_scipy(matrix)},
                {"atac": torch.ones(cells, dtype=torch.bool)},
                place % 2,
                place,
                place,
                cells,
            )
            times = []
            for step in range(4):
                start = time.process_time()
                model(minibatch, step=step, seed=0, kl_weight=1.0, cell_weight=1 / cells).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                times.append(time.process_time() - start)
            best = min(times[1:])
            rows.append((f"{features:,}", f"{cells:,}", f"{best:.3f}", f"{best / cells / features * 1e9:.2f}"))
    print("\none thread, ATAC alone, a thirtieth of the peaks non-zero\n")
    print(table(("features", "minibatch", "CPU s a step", "CPU ns per cell and feature"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter of an environment with scvi-tools")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps of 128 cells in a round")
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "liam-scale-benchmarks")
    parser.add_argument("--only", choices=("peers", "parts", "scaling"))
    parser.add_argument("--quick", action="store_true", help="few rounds and cells, to see that it runs")
    parser.add_argument("--serve", choices=("liam", "multivi"), help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--minibatch", type=int, default=128, help=argparse.SUPPRESS)
    parser.add_argument("--impl", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--with-parts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve == "liam":
        serve_liam(options.store, options.minibatch, options.steps, options.impl, options.precision, options.with_parts)
        return
    if options.serve == "multivi":
        serve_multivi(options.store, options.minibatch, options.steps)
        return
    if options.quick:
        options.rounds, options.steps, options.cells = 2, 3, 3_000
    sys.path.insert(0, str(ROOT))
    describe_machine()
    options.folder.mkdir(parents=True, exist_ok=True)
    store = make_store(options.folder, options.cells)
    chosen = [options.only] if options.only else ["peers", "parts", "scaling"]
    if "peers" in chosen:
        compare_peers(store, options)
    if "parts" in chosen:
        show_parts(store, options)
    if "scaling" in chosen:
        show_scaling(options)


if __name__ == "__main__":
    main()
