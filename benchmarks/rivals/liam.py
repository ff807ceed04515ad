"""liam-scale, by the contract of its rivals; --model concat is the late integration of the paper."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from contract import compete

TRAINING = {
    "alpha": float,
    "lr": float,
    "minibatch": int,
    "n_latent": int,
    "kl_warmup": str,
    "weight_decay": float,
    "likelihood": str,
}
"""Options of the training that may be given, beside those of all rivals."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="bavae")
    for name, kind in TRAINING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)
    parser.add_argument("--weights", nargs="+", default=None, metavar="MODALITY=WEIGHT")
    parser.add_argument("--keep", type=Path, default=None, help="folder that keeps the run")


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, int]:
    import pandas

    import liam_scale

    given = {name: getattr(arguments, name) for name in (*TRAINING, "weights", "max_epochs")}
    chosen = {name: value for name, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.keep or Path(folder) / "run"
        run = liam_scale.train(
            data, batch_key=arguments.batch_key, out=out, seed=arguments.seed, model=arguments.model, **chosen
        )
        run.embed(data)
        epochs = [int(pandas.read_csv(file)["epoch"].iloc[-1]) + 1 for file in Path(out).rglob("history.csv")]
    return data.obsm["X_liam"], max(epochs)


if __name__ == "__main__":
    compete(fit, "liam-scale", "torch", options=options)
