"""The `liam-scale` command: one word for each thing a user does."""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

try:
    import tyro

    from liam_scale.command import Command, reader_may_leave
except KeyboardInterrupt:  # torch takes seconds, in which nothing has begun that would have to be told.
    sys.exit(130)

COMMANDS = {
    "ingest": "source files -> one shuffled, checked store",
    "train": "store -> trained model (for several processes: torchrun -m liam_scale.train)",
    "embed": "trained model -> obsm['X_liam'] of the store",
    "decode": "trained model -> normalised expression, accessibility, protein",
    "differential": "embedding -> features that change between groups of cells",
    "archetypes": "embedding -> what the corners of the latent simplex stand for",
    "map": "cells of new samples -> the embedding of a trained model",
    "evaluate": "embedding -> table of metrics and pictures",
    "sweep": "several alphas, covariates and seeds -> curves, ranks, a recommendation",
    "append": "store + files of further cells -> the store with them",
    "merge": "stores -> one store",
    "features": "store -> the names of variable genes, of peaks in enough cells",
    "subset": "store -> a store of some of its cells or features",
    "export": "store -> one h5mu or h5ad, embeddings included",
    "info": "store -> one screen of what it holds",
    "check": "store -> all that is damaged in it",
    "demo": "all of it on a small data set that comes with the package",
}
"""What each command turns into what; each is the `main` of the module of its name."""

SHELLS = ("bash", "zsh", "tcsh")

USAGE = """usage: liam-scale COMMAND [OPTIONS]

Integrate multimodal single-cell data that does not fit in memory.

commands:
{commands}

liam-scale COMMAND --help shows the options of a command; --version the version;
--print-completion {{bash,zsh,tcsh}} a script that completes commands and options in a shell."""


def command(name: str) -> Command[Any]:
    return importlib.import_module(f"liam_scale.{name}").main


def usage() -> str:
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))


def print_completion(shell: str) -> None:
    """Print what `eval "$(liam-scale --print-completion bash)"` runs."""
    forms = [Annotated[command(name).form, tyro.conf.subcommand(name)] for name in COMMANDS]
    tyro.cli(functools.reduce(operator.or_, forms), prog="liam-scale", args=["--tyro-print-completion", shell])  # type: ignore[call-overload]


def main(argv: Sequence[str] | None = None) -> int:
    word, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if word in COMMANDS:
        try:
            work = command(word)
        except KeyboardInterrupt:
            return 130
        return work(rest)
    with reader_may_leave():
        if word in ("-h", "--help"):
            print(usage())
        elif word == "--version":
            print(f"liam-scale {version('liam-scale')}")
        elif word == "--print-completion" and rest in ([shell] for shell in SHELLS):
            print_completion(rest[0])
        else:
            what, got, choice = ("command", word, (*COMMANDS,))
            if word == "--print-completion":
                what, got, choice = word, " ".join(rest), SHELLS
            print(f"error: {what}: got {got!r}; choose one of {', '.join(choice)}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
