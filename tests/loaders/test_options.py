"""Options are checked against their annotations, in whatever way they were given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from loaders.options import LoaderConfig, Range, check_options


@dataclass(frozen=True)
class Options:
    """Options of a test."""

    kind: Literal["small", "large"] = "small"
    num_units: Annotated[int | None, Range(least=2, most=9)] = None
    rate: Annotated[float, Range(above=0, below=1)] = 0.5
    is_quick: bool = False
    names: tuple[str, ...] = ()
    out: Path | None = None

    def __post_init__(self) -> None:
        check_options(self, "--toy.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "LARGE"}, "--toy.kind: got 'LARGE'; choose one of small, large"),
        ({"num_units": "3"}, "--toy.num-units: got '3'; give a whole number"),
        ({"num_units": 3.0}, "--toy.num-units: got 3.0; give a whole number"),
        ({"num_units": True}, "--toy.num-units: got True; give a whole number"),
        ({"num_units": 1}, "--toy.num-units: got 1; give at least 2 and at most 9"),
        ({"rate": 1}, "--toy.rate: got 1.0; give above 0 and below 1"),
        ({"rate": float("nan")}, "--toy.rate: got nan; give a finite number"),
        ({"rate": float("inf")}, "--toy.rate: got inf; give a finite number"),
        ({"rate": None}, "--toy.rate: got None; give a finite number"),
        ({"is_quick": 1}, "--toy.is-quick: got 1; give true or false"),
        ({"names": "rna"}, "--toy.names: got 'rna'; give a list"),
        ({"names": ["rna", 3]}, "--toy.names: got 3; give a text in quotes"),
        ({"out": 3}, "--toy.out: got 3; give a path in quotes"),
    ],
)
def test_a_wrong_type_choice_or_range_is_named_with_the_cure(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace(".", r"\.") + "$"):
        Options(**given)


def test_fitting_values_become_the_declared_type() -> None:
    options = Options(num_units=np.int64(3), rate=np.float32(0.25), is_quick=np.True_, names=["a"], out="runs/a")
    assert options == Options(num_units=3, rate=0.25, is_quick=True, names=("a",), out=Path("runs/a"))
    kinds = [type(value) for value in (options.num_units, options.rate, options.is_quick, options.names)]
    assert kinds == [int, float, bool, tuple]


def test_an_amount_of_memory_is_checked_with_the_other_options() -> None:
    with pytest.raises(ValueError, match="memory: got 'plenty'; give an amount"):
        LoaderConfig(memory="plenty")
