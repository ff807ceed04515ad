"""liam-scale, by the contract of its rivals; --model concat is the late integration of the paper."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from contract import compete


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="bavae")
    parser.add_argument("--alpha", type=float, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="folder that keeps the run")


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, int]:
    import pandas

    import liam_scale

    chosen = {
        name: getattr(arguments, name) for name in ("alpha", "max_epochs") if getattr(arguments, name) is not None
    }
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
