"""Options and documents (JSON, TOML): size, types and ranges are checked in one way, whoever fills them."""

from __future__ import annotations

import json
import math
import numbers
import os
import sys
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import tyro

from loaders.modalities import Kinds
from loaders.sizing import parse_memory

_KINDS: Mapping[type, tuple[type | tuple[type, ...], str]] = {
    bool: ((bool, np.bool_), "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a finite number"),
    str: (str, "a text in quotes"),
    Path: ((str, os.PathLike), "a path in quotes"),
}
"""What is taken for a declared type (numpy's numbers too), and its name in messages."""


@dataclass(frozen=True)
class Range:
    """Numbers that an option takes, as in `lr: Annotated[float, Range(above=0)]`."""

    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    most: float = math.inf

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        ends = {"at least": self.least, "above": self.above, "below": self.below, "at most": self.most}
        return " and ".join(f"{word} {end:g}" for word, end in ends.items() if math.isfinite(end))


Size = Annotated[int, Range(least=1)]
"""Of a part, in cells or the like."""


def check_options(options: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against its annotation; called in `__post_init__`.

    Values of another but fitting type become the declared one: a numpy number, a list for a tuple, a text for a path.

    Parameters
    ----------
    prefix
        How messages begin the name of an option of a command line; without it they name the field.

    Raises
    ------
    ValueError
        A value has another type, is not among the choices or outside the range.
    """
    kind: Any = type(options)
    for name, hint in _hints(kind).items():
        option = prefix + name.replace("_", "-") if prefix else name
        object.__setattr__(options, name, checked(option, getattr(options, name), hint))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def named_numbers(
    option: str, texts: Sequence[str], *, wanted: str, least: float = -sys.float_info.max
) -> dict[str, float]:
    """Numbers by name, of texts such as `age=40`.

    Parameters
    ----------
    wanted
        How the message says what to give.

    Raises
    ------
    ValueError
        A text has no name, one that was given before, or no finite number of at least `least`.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if name in found:
            raise ValueError(f"{option}: got {name} twice; name each once")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not name or not least <= found[name] < math.inf:
            raise ValueError(f"{option}: got {text!r}; give {wanted}")
    return found


def checked(option: str, value: Any, hint: Any) -> Any:
    """A value as an annotation takes it; ValueError with the option's name where it does not."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = checked(option, value, arguments[0])
        for rule in arguments[1:]:
            if isinstance(rule, Range) and value is not None and not rule.holds(value):
                raise ValueError(f"{option}: got {value}; give {rule}")
        return value
    if origin in (Union, UnionType):
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else checked(option, value, other)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{option}: got {value!r}; choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{option}: got {value!r}; give a list")
        return tuple(checked(option, item, arguments[0]) for item in value)
    if origin in (dict, abc.Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{option}: got {value!r}; give a table")
        kinds = arguments or (Any, Any)
        return {checked(option, key, kinds[0]): checked(f"{option}.{key}", own, kinds[1]) for key, own in value.items()}
    if is_typeddict(hint):
        if lacking := _hints(hint).keys() - dict(value).keys():
            raise ValueError(f"{option}: got a table without {', '.join(sorted(lacking))}")
        return {key: checked(f"{option}.{key}", value[key], kind) for key, kind in _hints(hint).items()}
    return _settled(option, value, hint) if hint in _KINDS else value


def _settled(option: str, value: Any, kind: Any) -> Any:
    taken, name = _KINDS[kind]
    is_taken = isinstance(value, taken) and (kind is bool or not isinstance(value, bool))
    if not is_taken or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{option}: got {value!r}; give {name}")
    return kind(value)


MOST_BYTES = 256 << 20
"""Of a document. Names of millions of features take a fifth of it; read, a document takes ten times its size."""


def check_size(file: Path, most: int = MOST_BYTES) -> None:
    """ValueError for a file that would fill the memory."""
    if (size := file.stat().st_size) > most:
        raise ValueError(f"{file.name} has {size:,} bytes, expected at most {most:,}")


def read_table(file: Path, parse: Callable[[str], Any] = json.loads, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The table in a file.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It holds none, or is larger than `most` bytes.
    """
    check_size(file, most)
    try:
        table = parse(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply; write it anew") from None
    if not isinstance(table, dict):
        raise ValueError(f"it holds {type(table).__name__}, expected a table")
    return table


@dataclass(frozen=True)
class LoaderConfig:
    """How cells are read, shuffled and grouped into minibatches."""

    minibatch: Annotated[int, Range(least=1), tyro.conf.arg(aliases=["--minibatch"])] = 128
    """Cells of one optimizer step, over all ranks."""
    memory: Annotated[str, tyro.conf.arg(aliases=["--memory"], metavar="SIZE")] = "1GiB"
    """Memory of windows and read-ahead of all modalities together, over all ranks of this machine's process."""
    streams: Annotated[int | None, Range(least=1)] = None
    """Virtual ranks; fixed when a run is created. Default 16, or twice the ranks if that is more."""
    threads: Annotated[int | None, Range(least=1)] = None
    """Reader threads of one process; default: the cores of this process, at most 4; for a GPU its share, at most 16."""
    resident: Literal["auto", "on", "off"] = "off"
    """Keep what was read, on the GPU or beside `memory`: later epochs read nothing. auto: in half of what is free."""
    validation_share: Annotated[float, Range(least=0, below=1)] = 0.05
    """Share of every sample's cells held out for validation."""
    adt_transform: Literal["clr", "none"] = "clr"
    """Transform of ADT counts, made while reading: centred log-ratio per cell, or the values as they are."""
    balance: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Obs column whose categories are drawn equally often in an epoch."""

    def __post_init__(self) -> None:
        check_options(self)
        parse_memory(self.memory)

    def transforms(self, kinds: Kinds) -> dict[str, str]:
        """What reading makes of the counts of modalities; a logarithm is the model's affair."""
        kept = () if self.adt_transform == "clr" else ("adt",)
        return {name: "clr" for name, kind in kinds.items() if kind.transform == "clr" and name not in kept}

    def streams_for(self, ranks: int) -> int:
        """Number of streams of a new run on `ranks` ranks."""
        return self.streams if self.streams is not None else max(16, 2 * ranks)
