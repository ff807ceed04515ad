"""Ways in which a file may be wrong, drawn from a seeded generator: of bytes, of JSON and TOML, of HDF5."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

Draw = np.random.Generator

DEPTH = 100_000
"""Brackets that no parser by recursion survives."""

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf"), 0.5),
    *("", "a", "../..", "/etc", "x" * 3000, "\0", "\ud800", "0", "NaN", "rna", "gene", "atac"),
    *([], {}, [[[[]]]], [1, "a", None], {"a": {"b": {}}}, ["rna", "rna"], [[0.0]], {"rna": -1}),
)


def wrong_bytes(whole: bytes, draw: Draw) -> bytes:
    """Flipped bits, a lost end, zeros, or a piece that stands twice or is gone."""
    place = int(draw.integers(len(whole) + 1))
    length = int(draw.integers(1, 1 + min(512, len(whole))))
    kind = draw.integers(6)
    if kind <= 1:
        changed = bytearray(whole)
        for _ in range(int(draw.integers(1, 9))):
            changed[int(draw.integers(len(whole)))] ^= 1 << int(draw.integers(8))
        return bytes(changed)
    before, after = whole[:place], whole[place + length :]
    return (before, before + bytes(length) + after, before + whole[place:] + whole[place:], before + after)[kind - 2]


def wrong_json(text: str, draw: Draw, *, seal: Callable[[Any], Any] = lambda entry: entry) -> bytes:
    """A document with another value, key or place somewhere in it, or text that is none.

    Parameters
    ----------
    seal
        Gives what is changed its own hash again, so that the reader meets it behind the hash.
    """
    if draw.integers(4) == 0:
        return _wrong_text(text, draw)
    entry = json.loads(text)
    for _ in range(int(draw.integers(1, 3))):
        _change_within(entry, draw)
    return json.dumps(seal(entry)).encode()


def _wrong_text(text: str, draw: Draw) -> bytes:
    place = int(draw.integers(len(text)))
    odd = (
        "[" * DEPTH,
        '{"a":' * DEPTH,
        "9" * 5000,
        "NaN",
        text + text,
        text.replace(":", ": 1,", 1),
        text[:place] + "9" * 5000 + text[place:],
        text.replace("{", '{"sha256": "x", "format": 2, "model": null, ', 1),
        '"text"',
        "null",
        "",
    )
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: wrong_bytes(text.encode(), draw),
        lambda: odd[int(draw.integers(len(odd)))].encode(),
        lambda: text.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text[:place].encode() + b"\xff\xfe\0" + text[place:].encode(),
    )
    return kinds[int(draw.integers(len(kinds)))]()


def _places(entry: Any) -> list[tuple[Any, Any]]:
    """Every container in a document with each of its keys."""
    found, waiting = [], [entry]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


def _change_within(entry: Any, draw: Draw) -> None:
    places = _places(entry)
    if not places:
        return
    holder, key = places[int(draw.integers(len(places)))]
    odd = ODD_VALUES[int(draw.integers(len(ODD_VALUES)))]
    kind = draw.integers(8)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = [holder[key]]
    elif kind == 2 and isinstance(holder[key], int | float):
        holder[key] = -holder[key] if draw.integers(2) else holder[key] * 1000 + 1
    elif kind == 3 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 4 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = json.loads(json.dumps(odd))


def wrong_toml(text: str, draw: Draw) -> bytes:
    """A line with another value, twice, gone, or text that is no TOML."""
    if draw.integers(3) == 0:
        return _wrong_text(text, draw)
    lines = text.splitlines()
    odd = (
        *("1", "-1", "0", "1e400", "nan", "inf", "true", '""', '"a"', "[]", "[[]]", "{}", "{a = 1}", "1979-05-27"),
        *("9" * 5000, "[" * DEPTH, "'" * 3, '["rna", 1]', '"\\u0000"', "0x10", '"../../x"', "[1, 'a', {}]"),
    )
    for _ in range(int(draw.integers(1, 3))):
        number = int(draw.integers(len(lines)))
        key = lines[number].partition("=")[0].strip()
        lines[number] = (
            f"{key} = {odd[int(draw.integers(len(odd)))]}",
            f"{lines[number]}\n{lines[number]}",
            "",
            f"{key}x = 1",
            f"[{key or 'x'}]",
            f"{key}.a.b = 1",
        )[min(5, int(draw.integers(8)))]
    return "\n".join(lines).encode()


def wrong_hdf5(file: h5py.File, draw: Draw) -> None:
    """Somewhere in a file another array, attribute or link than its format has there."""
    names: list[str] = []
    file.visit(names.append)
    for _ in range(int(draw.integers(1, 3))):
        name = names[int(draw.integers(len(names)))]
        held = file.get(name) if file.get(name, getlink=True) is not None else None
        if held is None or (getattr(held, "size", 0) and held.size > 1 << 20):
            continue
        if draw.integers(4) == 0:
            _wrong_attribute(file, name, draw)
        elif isinstance(held, h5py.Dataset):
            _wrong_array(file, name, draw)
        else:
            _wrong_link(file, name, names, draw)


def _wrong_attribute(file: h5py.File, name: str, draw: Draw) -> None:
    attributes = file[name].attrs
    keys = [*attributes, "encoding-type", "encoding-version", "shape", "_index", "column-order", "categories"]
    key = keys[int(draw.integers(len(keys)))]
    odd = (
        *(-1, 0, 2**62, np.nan, "", "csc_matrix", "array", "dataframe", "categorical", "nullable-integer", "dict"),
        *(b"\xff\xfe", "x/y", "../obs", "nowhere", np.array([3, 4]), np.array([2**40, 2**40]), np.array([-1, 5])),
        *(np.array(["a", "a"], object), np.zeros((2, 2)), np.array([], np.float64), np.array([1.5, 2.5])),
        *(np.array(["_index", "donor"], object), h5py.Empty("f8")),
    )
    if key in attributes and draw.integers(4) == 0:
        del attributes[key]
    else:
        attributes[key] = odd[int(draw.integers(len(odd)))]


def _wrong_array(file: h5py.File, name: str, draw: Draw) -> None:
    old = file[name]
    values, attributes = old[()], dict(old.attrs)
    chosen = WRONG_ARRAYS[int(draw.integers(len(WRONG_ARRAYS)))]
    if isinstance(values, np.ndarray):
        values = _changed(np.atleast_1d(values), chosen, draw)
    del file[name]
    if chosen == "gone":
        return
    if chosen == "declared":
        file.create_dataset(name, (2**40,), chunks=(1000,), dtype=old.dtype if values is None else "f4")
    elif chosen == "group":
        file.create_group(name)
    else:
        file[name] = {"scalar": 3, "text": "text", "empty": h5py.Empty("f4")}.get(chosen, values)
    file[name].attrs.update(attributes)


WRONG_ARRAYS = (
    *("gone", "declared", "group", "scalar", "text", "empty", "shorter", "longer", "flat", "twice", "float", "narrow"),
    *("bytes", "negative", "huge", "nan", "shuffled", "reversed", "one", "one", "one", "bool", "complex", "big-endian"),
)


def _changed(values: np.ndarray[Any, Any], chosen: str, draw: Draw) -> Any:
    place = int(draw.integers(max(1, len(values))))
    is_number = values.dtype.kind in "iuf"
    simple: dict[str, Callable[[], Any]] = {
        "shorter": lambda: values[:place],
        "longer": lambda: np.concatenate([values, values[:place]]),
        "flat": lambda: np.stack([values, values]),
        "twice": lambda: np.repeat(values, 2, axis=0),
        "shuffled": lambda: draw.permutation(values),
        "reversed": lambda: values[::-1],
        "bytes": lambda: np.array([b"\xff\xfe", b"a"] * 4, "S2"),
    }
    of_numbers: dict[str, Callable[[], Any]] = {
        "float": lambda: values.astype(np.float64) + 0.25,
        "narrow": lambda: values.astype(np.int8),
        "negative": lambda: -values.astype(np.int64),
        "huge": lambda: values.astype(np.int64) + 2**40,
        "nan": lambda: np.where(np.arange(values.size).reshape(values.shape) == place, np.nan, values),
        "bool": lambda: values.astype(bool),
        "complex": lambda: values.astype(complex),
        "big-endian": lambda: values.astype(values.dtype.newbyteorder(">")),
        "one": lambda: _with_one(values, place, draw),
    }
    known = simple | of_numbers if is_number else simple
    return known[chosen]() if chosen in known and len(values) else values


def _with_one(values: np.ndarray[Any, Any], place: int, draw: Draw) -> np.ndarray[Any, Any]:
    changed = values.astype(np.int64 if values.dtype.kind in "iu" else np.float64)
    odd = (-1, 2**31 - 1, 2**31, 2**32, 2**62, -(2**62), len(values), 10**6, 7)
    changed[place] = odd[int(draw.integers(len(odd)))]
    return changed


def _wrong_link(file: h5py.File, name: str, names: list[str], draw: Draw) -> None:
    other = names[int(draw.integers(len(names)))]
    kind = draw.integers(6)
    attributes = dict(file[name].attrs)
    if kind <= 3:
        del file[name]
    if kind == 0:
        file[name] = h5py.SoftLink("/nowhere")
    elif kind == 1:
        file[name] = h5py.SoftLink("/")
    elif kind == 2:
        file[name] = np.arange(5)
        file[name].attrs.update(attributes)
    elif kind == 4:
        file[f"{name}/ring"] = h5py.SoftLink(f"/{name}")
    elif kind == 5 and other in file and not other.startswith(name) and not name.startswith(other):
        del file[name]
        file[name] = file[other]
