"""Check: `liam-scale check atlas.zarr` looks at every byte of a store and lists all that is damaged."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from liam_scale.command import Answer, Command
from loaders.check import check_store
from loaders.options import Range, check_options


@dataclass(frozen=True)
class CheckConfig:
    """Look at every checksum, offset, name, code and count of a store, its embeddings too."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store made by ingest; of other formats all is read, and what cannot be known is said."""
    threads: Annotated[int | None, Range(least=1)] = None
    """Default: the cores of this process, at most 4."""

    def __post_init__(self) -> None:
        check_options(self)


def _check(config: CheckConfig) -> Answer:
    report, failure = check_store(config.store, threads=config.threads), None
    if not report.is_sound:
        number = len(report.damages)
        failure = (
            f"{report.store}: got {number:,} damaged place{'' if number == 1 else 's'}; copy or download the store "
            "again, or ingest again (an embedding: embed again)"
        )
    return Answer(str(report), {**asdict(report), "is_sound": report.is_sound}, failure)


main = Command(
    CheckConfig, _check, prog="liam-scale check", description="Store -> all that is damaged in it.", answers=True
)

if __name__ == "__main__":
    sys.exit(main())
