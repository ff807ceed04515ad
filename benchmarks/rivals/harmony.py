"""Harmony (Korsunsky 2019, harmonypy) on the components of every modality side by side."""

import argparse
from typing import Any

from contract import compete, components


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, None]:
    import harmonypy

    before = components(data)
    options = {"random_state": arguments.seed, "max_iter_harmony": 20}
    found = harmonypy.run_harmony(before, data.obs, [arguments.batch_key], **options).Z_corr
    return (found.T if found.shape[0] == before.shape[1] else found), None


if __name__ == "__main__":
    compete(fit, "harmonypy")
