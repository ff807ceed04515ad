"""`python -m loaders.ingest SOURCE... --out STORE`: ingest without the rest of liam-scale."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loaders.ingest import ingest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an ingest from the command line; 0 when the store is there, 2 for what the user gave, 1 for the rest."""
    parser = argparse.ArgumentParser(prog="python -m loaders.ingest", description=__doc__)
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=".h5ad, .h5mu, 10x .h5, .zarr; rna=a.h5ad,atac=b.h5ad"
    )
    parser.add_argument("--out", required=True, help="store to write")
    parser.add_argument("--sample-key", help="obs column that becomes `sample`; default: each file's name")
    parser.add_argument(
        "--join", choices=("inner", "outer"), default="inner", help="features kept where sources differ"
    )
    parser.add_argument("--layer", help="layer that holds the counts; default: X")
    parser.add_argument("--memory", default="1GiB", help="memory for chunks and shuffling")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that exists")
    try:
        ingest(**vars(parser.parse_args(arguments)))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
