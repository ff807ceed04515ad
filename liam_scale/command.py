"""What every command shares: options from flags and TOML, one log, errors in one block."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import platform
import re
import sys
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_type_hints

import numpy as np
import pandas as pd
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from liam_scale.tables import from_table, read_toml, to_toml
from liam_scale.training.ranks import AgreedError, launched_ranks
from loaders.formats.cache import DEFAULT_SIZE, use_cache
from loaders.formats.damage import Damaged

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given(Generic[T]):
    """A command line: the options of one command, and those that every command takes."""

    options: Annotated[T, tyro.conf.arg(name="")]
    config: Path | None = None
    """TOML file with options, such as config.toml of a run; the command line wins."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Log more: versions, options, every rank."""
    debug: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the traceback of an error."""
    cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep what is read of a remote store (s3://, https://) in this folder of a local disk, for all that read it."""
    cache_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = DEFAULT_SIZE
    """Of the cache; what was used longest ago goes first."""


@dataclass(frozen=True)
class GivenOrJson(Given[T]):
    """A command line of a command that answers."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the answer as one JSON document on stdout, and all else on stderr."""


@dataclass(frozen=True)
class Answer:
    """What a command found."""

    text: str
    document: dict[str, Any]
    """The same for programs."""
    failure: str | None = None
    """Why the command ends with code 1 when it has told this."""


@dataclass(frozen=True)
class Command(Generic[T]):
    """A command: called with arguments it does its work and returns an exit code."""

    kind: type[T]
    """Frozen dataclass of the options."""
    work: Callable[[T], object]
    prog: str
    description: str
    answers: bool = False
    """Whether `work` returns an `Answer`, which is printed as text, or as JSON with --json."""

    @property
    def form(self) -> Any:
        """What the parser fills in."""
        return self._given[self.kind]

    @property
    def _given(self) -> Any:
        return GivenOrJson if self.answers else Given

    def parse(self, arguments: Sequence[str]) -> T:
        """Options from flags and `--config`.

        Raises
        ------
        ValueError
            A file or a value cannot be used. What the parser itself refuses ends in SystemExit, as --help does.
        """
        file, said = _file_in(arguments), io.StringIO()
        default = self._given(_from_file(self.kind, file))
        try:
            with contextlib.redirect_stderr(said), _READABLE:
                given = tyro.cli(
                    self.form, args=list(arguments), prog=self.prog, description=self.description, default=default
                )
        except SystemExit as stop:
            read = f"options were read from {file}"
            if (refused := _own_check(stop)) is not None:
                raise (refused if file is None else ValueError(f"{refused} ({read})")) from None
            if launched_ranks()[0] == 0:
                sys.stderr.write(said.getvalue() + (f"{read}\n" if file is not None and stop.code else ""))
            raise
        if given.cache is not None:
            use_cache(given.cache, given.cache_size)
        return given.options

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        arguments = sys.argv[1:] if argv is None else argv

        def work() -> None:
            options = self.parse(arguments)
            _log.debug(
                "liam-scale %s, torch %s, Python %s", *map(version, ("liam-scale", "torch")), platform.python_version()
            )
            _log.debug("%s", to_toml(options))
            if not self.answers:
                self.work(options)
                return
            as_json = "--json" in arguments
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                found = self.work(options)
            assert isinstance(found, Answer)
            if as_json:
                print(json.dumps(plain(found.document), indent=1, allow_nan=False), flush=True)
            elif found.text:
                print(found.text, flush=True)
            if found.failure is not None:
                raise RuntimeError(found.failure)

        return run(work, self._worded, debug="--debug" in arguments, verbose="--verbose" in arguments)

    def _worded(self, message: str) -> str:
        return as_typed(as_typed(message, self.kind), self._given)


def plain(value: Any) -> Any:
    """A value as JSON has it: a dataclass is its fields, a table its rows, what is no finite number null."""
    if is_dataclass(value):
        return plain(vars(value))
    if isinstance(value, pd.DataFrame):
        return plain(value.to_dict("records"))
    if isinstance(value, dict):
        return {str(name): plain(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [plain(held) for held in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def flag_of(key: str) -> str:
    return "--" + key.replace("_", "-")


def as_typed(message: str, kind: Any, section: str = "") -> str:
    """A message of the loaders, which name an option as an argument of Python, in the words of a command line.

    `layer: ...` at its beginning becomes `--layer: ...`, and anywhere `layer='raw'` becomes `--layer raw`.
    """
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(hint):
            message = as_typed(message, hint, f"{name}.")
        elif tyro.conf.Positional not in getattr(hint, "__metadata__", ()):
            flag = flag_of(section + name)
            message = re.sub(rf"^{name}: ", f"{flag}: ", message)
            message = re.sub(rf"\b{name}='([^']*)'", rf"{flag} \1", message.replace(f"{name}=True", flag))
    return message


def _file_in(arguments: Sequence[str]) -> str | None:
    """What `--config` names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?")
    named: str | None = finder.parse_known_args(arguments)[0].config
    return named


def _from_file(kind: type[T], file: str | None) -> T:
    """Options as a file says, or their defaults; not yet checked together."""
    if file is None:
        return from_table(kind, {}, absent=tyro.MISSING)
    try:
        return from_table(kind, read_toml(Path(file)), absent=tyro.MISSING)
    except OSError as error:
        inside = Path(file) / "config.toml"
        cure = inside if inside.exists() else "a TOML file, such as config.toml of a run"
        raise ValueError(f"--config: {file} cannot be read ({error.strerror}); name {cure}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config: {file} is not TOML in UTF-8 ({error}); correct that place") from None
    except ValueError as error:
        raise ValueError(f"--config: {file}: {error}") from None


def _own_check(stop: BaseException) -> ValueError | None:
    """The error of an option's own check, which the parser would cut into lines and show under a name of its own."""
    error: BaseException | None = stop
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and any(frame.f_code.co_name == "__post_init__" for frame, _ in frames):
            return error
        error = error.__context__
    return None


_READABLE = ConstructorRegistry()
"""How help names values."""


@_READABLE.primitive_rule
def _text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    return (
        None
        if info.type is not str
        else PrimitiveConstructorSpec(
            nargs=1,
            metavar="NAME",
            instance_from_str=lambda given: given[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
        )
    )


@_READABLE.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """An option that may be absent looks like any other; `None` on the command line takes a file's value away."""
    kinds = get_args(info.type)
    if NoneType not in kinds or len(kinds) != 2:
        return None
    own = next(kind for kind in kinds if kind is not NoneType)
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(own, info.markers))
    assert isinstance(inner, PrimitiveConstructorSpec), own
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=inner.metavar,
        instance_from_str=lambda given: None if given == ["None"] else inner.instance_from_str(given),
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else inner.str_from_instance(value),
        choices=None if inner.choices is None else (*inner.choices, "None"),
    )


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Where `| head` closes stdout, end in silence with the exit code of a process that SIGPIPE ended."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            # Another pipe may have broken, which is to be told.
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + 13) from None
        raise


def _log_to_stderr(rank: int, *, verbose: bool) -> None:
    level = logging.INFO if rank == 0 else logging.ERROR
    form = f"%(asctime)s rank {rank} %(name)s: %(message)s" if verbose else "%(message)s"
    logging.basicConfig(level=logging.DEBUG if verbose else level, format=form, stream=sys.stderr)
    for noisy in ("torch", "numba", "zarr", "numcodecs", "asyncio", "matplotlib", "PIL", "h5py", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def run(
    main: Callable[[], None], worded: Callable[[str], str] = str, *, debug: bool = False, verbose: bool = False
) -> int:
    """Run a command; an error becomes one block on stderr, in the words of the command, and an exit code.

    Returns
    -------
    0 when it worked, 2 when what the user gave cannot be used (ValueError), 1 when the run failed, 130 on Ctrl-C.
    """
    rank, size = launched_ranks()
    _log_to_stderr(rank, verbose=verbose)
    # A third-party note that a user can do nothing about, on every start.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    try:
        with reader_may_leave():
            main()
    except KeyboardInterrupt as stop:
        if rank == 0:
            print(f"interrupted{stop}", file=sys.stderr)
        return 130
    except Exception as error:
        code, agreed = 2 if isinstance(error, ValueError) else 1, error if isinstance(error, AgreedError) else None
        if debug:
            traceback.print_exc()
        elif rank == agreed.teller if agreed else rank == 0 or code == 1:
            where = f" (rank {rank})" if size > 1 and code == 1 and not agreed else ""
            name = "" if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__}: "
            hint = "" if name == "" else "\n  --debug shows where it happened"
            hint = "\n  `liam-scale check STORE` is that check" if isinstance(error, Damaged) else hint
            print(f"error{where}: {name}{worded(str(error))}{hint}", file=sys.stderr, flush=True)
        elif agreed:
            # torchrun ends all ranks as soon as one has ended: the one that tells must be first.
            time.sleep(1.0)
        return code
    return 0
