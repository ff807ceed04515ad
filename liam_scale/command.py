"""What every command shares: parsing a dataclass from TOML and flags, and errors in one block."""

from __future__ import annotations

import dataclasses
import logging
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
import tyro

from liam_scale.training.distributed import launched_ranks

T = TypeVar("T")


def flag_of(key: str) -> str:
    return "--" + key.replace("_", "-")


def _flags_from_toml(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The flags that say what a TOML table says, so that one parser checks both."""
    flags: list[str] = []
    for key, value in table.items():
        name = prefix + key
        if isinstance(value, Mapping):
            flags += _flags_from_toml(value, name + ".")
        elif isinstance(value, bool):
            section, _, last = name.rpartition(".")
            flags.append(flag_of(name if value else f"{section}.no_{last}" if section else f"no_{last}"))
        elif isinstance(value, list):
            flags += [flag_of(name), *(str(item) for item in value)]
        else:
            flags += [flag_of(name), str(value)]
    return flags


def _expand_config(argv: Sequence[str], positional: str | None) -> list[str]:
    """Replace `--config FILE` by the flags it stands for; the command line's own flags win."""
    arguments = list(argv)
    is_config = [argument.partition("=")[0] == "--config" for argument in arguments]
    if not any(is_config):
        return arguments
    index = is_config.index(True)
    argument = arguments[index]
    if argument == "--config":
        if index + 1 == len(arguments):
            raise ValueError("--config: got nothing; name a TOML file")
        file, rest = arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    else:
        file, rest = argument.partition("=")[2], arguments[:index] + arguments[index + 1 :]
    try:
        table = tomllib.loads(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"--config: {file} cannot be read ({error.strerror}); name an existing TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config: {file} is not valid TOML ({error})") from error
    leading: list[str] = []
    if positional is not None and positional in table:
        values = table.pop(positional)
        if not rest or rest[0].startswith("-"):
            leading = [str(v) for v in (values if isinstance(values, list) else [values])]
    given = {a.partition("=")[0].replace("--no-", "--").replace(".no-", ".") for a in rest if a.startswith("--")}
    # Positionals first: a list option of the file would swallow one that follows it.
    return leading + rest + _without(_flags_from_toml(table), given)


def _without(flags: list[str], given: set[str]) -> list[str]:
    """Drop flags (with their values) that the command line gives itself."""
    kept: list[str] = []
    is_dropped = False
    for item in flags:
        if item.startswith("--"):
            is_dropped = item.replace("--no-", "--").replace(".no-", ".") in given
        if not is_dropped:
            kept.append(item)
    return kept


def parse(
    kind: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    short: Mapping[str, str] | None = None,
    positional: str | None = None,
) -> T:
    """Parse a frozen dataclass from flags.

    Parameters
    ----------
    short
        Flags without their section, and the full flag each stands for (`--alpha` for `--model.alpha`).
    positional
        Name of the positional field, which a TOML file may also give.
    """
    short = short or {}
    arguments: list[str] = []
    for argument in sys.argv[1:] if argv is None else argv:
        name, equals, value = argument.partition("=")
        arguments.append(short.get(name, name) + equals + value)
    if short:
        listed = ", ".join(f"{s} ({full})" for s, full in short.items())
        description += f"\n\nShort forms: {listed}. --config FILE reads the same options from TOML."
    return tyro.cli(kind, args=_expand_config(arguments, positional), prog=prog, description=description)


def to_table(value: Any) -> Any:
    """A dataclass as a TOML table: nested, without absent values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: to_table(entry) for name, entry in entries if entry is not None}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_table(item) for item in value]
    return value


def to_toml(value: Any) -> str:
    return tomli_w.dumps(to_table(value))


def run(main: Callable[[], None], *, debug: bool = False) -> int:
    """Run a command; an error becomes one block on stderr and an exit code.

    Returns
    -------
    0 when it worked, 2 when what the user gave cannot be used (ValueError), 1 when the run failed, 130 on Ctrl-C.
    """
    rank, size = launched_ranks()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for noisy in ("torch", "numba", "zarr", "numcodecs", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A third-party note that a user can do nothing about, on every start.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code = 2 if isinstance(error, ValueError) else 1
        if debug:
            traceback.print_exc()
        elif code == 1 or rank == 0:
            where = f" (rank {rank})" if size > 1 and code == 1 else ""
            kind = "" if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__}: "
            hint = "" if kind == "" else "\n  --debug shows where it happened"
            print(f"error{where}: {kind}{error}{hint}", file=sys.stderr, flush=True)
        return code
    return 0
