"""Options as TOML tables and back: what a file says is checked against the types of the fields."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from loaders.options import checked, read_table


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


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Several values, where a user or an older file may give one text, or none."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def to_dotted(value: Any) -> dict[str, Any]:
    """A dataclass as one flat table: `{"model.alpha": 5.0}`."""
    flat: dict[str, Any] = {}
    for name, entry in to_table(value).items():
        flat |= {f"{name}.{key}": held for key, held in entry.items()} if isinstance(entry, dict) else {name: entry}
    return flat


def to_toml(value: Any) -> str:
    return tomli_w.dumps(to_table(value))


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a file of options; OSError or ValueError where it is none."""
    return read_table(file, tomllib.loads, most=1 << 20)


def from_table(kind: type, table: Mapping[str, Any], *, absent: Any, section: str = "") -> Any:
    """A dataclass with the values of a table; its own checks (`__post_init__`) are not run.

    Parameters
    ----------
    absent
        What a required field without a value gets.
    section
        Prefix of the keys in messages.

    Raises
    ------
    ValueError
        A key that is no field, or a value of another type; the message begins with the key.
    """
    hints = typing.get_type_hints(kind)
    for key in table.keys() - hints.keys():
        near = difflib.get_close_matches(key, hints, n=3) or sorted(hints)
        raise ValueError(
            f"{section}{key}: there is no such option; choose among {', '.join(section + n for n in near)}"
        )
    options: Any = object.__new__(kind)
    for field in dataclasses.fields(kind):
        key, hint = section + field.name, hints[field.name]
        if field.name in table and not dataclasses.is_dataclass(hint):
            value = table[field.name]
            is_one_of_several = typing.get_origin(hint) is tuple and not isinstance(value, list)
            value = checked(key, [value] if is_one_of_several else value, hint)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            inner = table.get(field.name, {})
            if not isinstance(inner, Mapping):
                raise ValueError(f"{key}: got {inner!r}; give a table, [{key}]")
            value = from_table(hint, inner, absent=absent, section=f"{key}.")
        elif field.default is not dataclasses.MISSING:
            value = field.default
        else:
            value = absent
        vars(options)[field.name] = value
    return options


def names_in(file: Path) -> list[str]:
    """The names in a text file, one a line."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--features: {file} is no text that can be read ({error}); give one name a line") from None
    if not any(names):
        raise ValueError(f"--features: {file} is empty; give one name a line")
    return [name for name in names if name]
