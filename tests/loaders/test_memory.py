"""Amounts of memory as users write them."""

import pytest

from loaders.sizing import parse_memory


@pytest.mark.parametrize(
    ("text", "number"),
    [("1GiB", 2**30), ("512MiB", 2**29), ("2 GB", 2 * 10**9), ("1.5g", 1_500_000_000), ("1000", 1000), (4096, 4096)],
)
def test_amounts_are_read(text: str | int, number: int) -> None:
    assert parse_memory(text) == number


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "1 light-year", "GiB"])
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="give an amount such as"):
        parse_memory(text)
