"""Every Triton kernel as it is shipped, compiled for A100, H100 and B200 without a GPU.

    python benchmarks/gpu_compile.py --target 80 90 100 --json kernels.json

The kernels' own callers are run on small CPU tensors with the launch replaced by a note of its arguments, so that what
is compiled has the types, tiles and constants of a training step. ptxas comes with Triton's wheel. Exit code 1 if a
kernel spills registers or asks for more shared or tensor memory than the card has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ROOT, table

SHARED_KILOBYTES = {80: 163, 90: 227, 100: 227}
"""Shared memory that one program may have."""

TENSOR_COLUMNS = 512
"""Columns of a B200's tensor memory; a kernel that asks for more is compiled to a trap, in silence."""

POINTERS = {
    "float32": "*fp32",
    "float64": "*fp64",
    "bfloat16": "*bf16",
    "int32": "*i32",
    "int64": "*i64",
    "uint8": "*u8",
    "uint16": "*u16",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Job:
    """A kernel with the types and constants of one launch."""

    module: str
    name: str
    precision: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass
class Recorder:
    """Takes the place of `launch` and notes what would have been compiled."""

    precision: str = ""
    jobs: dict[Job, None] = field(default_factory=dict)

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: Any, tile: Any = None, **constants: Any) -> None:
        if tile is not None:
            constants |= {"CELLS": tile.cells, "FEATURES": tile.features}
            constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
        options = tuple((name, constants.pop(name)) for name in OPTIONS if name in constants)
        names = kernel.arg_names[: len(arguments)]
        assert set(kernel.arg_names[len(arguments) :]) == set(constants), f"{kernel.__name__}: arguments do not fit"
        signature, aligned = [], []
        for name, value in zip(names, arguments, strict=True):
            is_number = isinstance(value, int)
            signature.append((name, "i32" if is_number else POINTERS[str(value.dtype).removeprefix("torch.")]))
            is_plain = name in (kernel.do_not_specialize or ())
            if not is_number or (value % 16 == 0 and not is_plain):
                aligned.append(name)
        job = (kernel.fn.__module__, kernel.__name__, constants.get("PRECISION", "float32"))
        found = Job(*job, tuple(signature), tuple(sorted(constants.items())), tuple(aligned), options)
        self.jobs[found] = None


def record(target: int, hidden: int = 128) -> list[Job]:
    """All launches of a training step on a card, in each precision, with counts of each type and both likelihoods."""
    import torch

    from liam_scale.kernels.cuda import counts as counts_module
    from liam_scale.kernels.cuda import (
        hidden_layer,
        launch,
        negative_binomial,
        negative_multinomial,
        noise,
        softmax,
        sparse,
    )
    from liam_scale.kernels.gradients import make_targets
    from liam_scale.kernels.options import TILE_BYTES, SizedLayer
    from liam_scale.kernels.terms import Coupling
    from loaders.minibatch import SparseCounts

    recorder = Recorder()
    softmax.capability = lambda device: target
    kernels = (negative_binomial, negative_multinomial, noise, softmax, sparse, hidden_layer)
    for module in (launch, counts_module, *kernels):
        module.launch = recorder
    cells, features = 130, 1000
    noise.hash_bits(torch.arange(cells), 1, 2, 128)
    _record_hidden_layers(hidden_layer, cells, hidden)
    indptr, indices = torch.arange(cells + 1).int() * features, torch.arange(features).int().repeat(cells)
    values = torch.ones(cells * features)
    for counts in [SparseCounts(indptr, indices, values.to(kind), features) for kind in (torch.uint8, torch.float32)]:
        few = SparseCounts(torch.arange(cells + 1).int(), indices[:cells], counts.values[:cells], features)
        for found in (counts, few):
            for is_log in (False, True):
                entries = sparse.entries(found, torch.float32, log1p=is_log)
                sparse.product(entries, torch.zeros(features, hidden))
                sparse.write_gradient(entries, torch.zeros(cells, hidden), torch.zeros(features, hidden))
        of_features = (torch.zeros(features, hidden), torch.zeros(features))
        inputs = (torch.zeros(cells, hidden), *of_features, torch.ones(cells))
        layer = SizedLayer(counts, *inputs, torch.ones(cells), torch.zeros(features))
        for precision in ("float32", "tf32", "bf16"):
            targets = make_targets([None] * 3, (*of_features, of_features[1]))
            is_narrow = counts.values.dtype == torch.uint8
            for coupling in (None, Coupling(1.0, 1.0)) if is_narrow else (None,):
                for wanted in (targets, None):
                    negative_multinomial.evaluate(layer, torch.ones(cells), coupling, precision, TILE_BYTES, wanted)
            thetas = (torch.zeros(features), torch.zeros(features, 13))
            for log_theta in thetas if is_narrow else thetas[:1]:
                targets = make_targets([None] * 3, (*of_features, log_theta))
                sample = torch.zeros(cells, dtype=torch.int64)
                for wanted in (targets, None):
                    options = (precision, TILE_BYTES, wanted)
                    negative_binomial.evaluate(layer, layer.library, log_theta, sample, *options)
    return list(recorder.jobs)


def _record_hidden_layers(room: Any, cells: int, hidden: int) -> None:
    """Of encoders, the latent space, decoders and the adversary, and of a model of one sample."""
    import torch

    from liam_scale.kernels.device.noise import Dropout

    linear, bias = torch.zeros(cells, hidden, requires_grad=True), torch.zeros(hidden, requires_grad=True)
    rows, places = torch.zeros(13, hidden, requires_grad=True), torch.arange(cells)
    dropout = Dropout(places, 1, 2, 0.1)
    parts = [(bias, rows, dropout), (None, rows, dropout), (None, rows, None), (bias, None, dropout)]
    for own_bias, own_rows, own_dropout in [*parts, (None, None, dropout), (None, None, None)]:
        given = (linear, own_bias, own_rows, None if own_rows is None else places)
        room.evaluate(*given, layer_norm=True, dropout=own_dropout).sum().backward()


def compile_one(job: Job, target: int, most_registers: int | None = None) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one kernel on one card, by ptxas."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.name)
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature={**dict(job.signature), **{name: "constexpr" for name, _ in job.constants}},
        constexprs={place[name]: value for name, value in job.constants},
        attrs={place[name]: [["tt.divisibility", 16]] for name in job.aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={**dict(job.options), "maxnreg": most_registers}
    )
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, stack = _resources(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    constants = dict(job.constants)
    columns = getattr(compiled.metadata, "tmem_size", 0)
    instructions = re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)", ptx)
    return {
        "kernel": job.name,
        "precision": job.precision,
        "target": target,
        "tile": f"{constants['CELLS']} x {constants['FEATURES']}" if "CELLS" in constants else "",
        "counts": dict(job.signature).get("dense", "")[1:],
        "variant": ", ".join(
            f"{k} {v}" for k, v in job.constants if k in ("IS_LOG", "IS_EXACT", "EPSILON", "SAMPLES") and v
        ),
        "registers": registers,
        "spilled": stack,
        "shared": shared,
        "tensor_memory": columns,
        "products": instructions[0] if instructions else "",
        "fits": stack == 0 and columns <= TENSOR_COLUMNS and shared <= SHARED_KILOBYTES[target] * 1024,
    }


def _resources(binary: bytes, folder: Path) -> tuple[int, int]:
    """Registers, and bytes of stack, where nothing but spilled registers stands: the kernels have no arrays."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(folder / "cuobjdump"), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump did not say what the kernel uses: {said}")
    return int(found[1]), int(found[2])


def compile_all(
    targets: list[int], only: str = "", processes: int = 2, most_registers: int | None = None
) -> Iterator[dict[str, Any]]:
    pairs = [(job, target) for target in targets for job in record(target) if only in job.name]
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(compile_one, *zip(*pairs, strict=True), [most_registers] * len(pairs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, nargs="+", default=list(SHARED_KILOBYTES), choices=list(SHARED_KILOBYTES))
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--registers", type=int, help="most registers of a thread; default: what the card has")
    parser.add_argument("--json", type=Path, help="also write the results to a file")
    options = parser.parse_args()
    results = list(compile_all(options.target, options.only, options.processes, options.registers))
    header = list(results[0]) if results else []
    print(table(header, [list(row.values()) for row in results]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    bad = [row for row in results if not row["fits"]]
    print(f"{len(results)} compiled, {len(bad)} spill or do not fit" if results else "nothing compiled")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
