"""MULTIVI and TOTALVI of scvi-tools on a store that does not fit the memory that they are given.

    python benchmarks/scvi_out_of_core.py atlas.zarr --model multivi --limit 2GiB [--in-memory]

The limit is the kernel's (RLIMIT_DATA: all that the process allocates), set before scvi-tools is imported. With
--in-memory the same model is made of the whole data in the same process, as scvi-tools does it.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

from process_memory import peak_of_process

from loaders.sizing import describe_memory, parse_memory

LAYERS = {
    "multivi": {"rna_layer": "rna", "atac_layer": "atac"},
    "totalvi": {"rna_layer": "rna", "protein_layer": "adt"},
}


def describe_data(store: Any, names: list[str]) -> None:
    held = [store.schema.modalities[name] for name in names]
    dense = sum(4 * store.schema.num_cells * m.num_features for m in held)
    sparse = sum(8 * m.num_nonzeros for m in held)
    print(
        f"{store.schema.num_cells:,} cells: {describe_memory(dense)} dense, {describe_memory(sparse)} as CSR in memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--model", choices=list(LAYERS), default="multivi")
    parser.add_argument("--batch-key", default="sample")
    parser.add_argument("--limit", help="memory that the process may allocate, e.g. 2GiB")
    parser.add_argument("--memory", default="256MiB", help="of the loader")
    parser.add_argument("--minibatch", type=int, default=256)
    parser.add_argument("--max-epochs", type=int, default=1)
    parser.add_argument("--minibatches", type=int, help="with --in-memory: end an epoch after so many")
    parser.add_argument("--in-memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (parse_memory(arguments.limit),) * 2)
    import scvi

    from loaders import LoaderConfig
    from loaders.lightning import StoreDataModule

    scvi.settings.seed = 0
    kind = {"multivi": scvi.model.MULTIVI, "totalvi": scvi.model.TOTALVI}[arguments.model]
    config = LoaderConfig(minibatch=arguments.minibatch, memory=arguments.memory)
    names = {"multivi": ["rna", "atac"], "totalvi": ["rna", "adt"]}[arguments.model]
    # All of every sample is an example too: then scvi-tools has its data in memory.
    size = 1 << 40 if arguments.in_memory else 256
    options: dict[str, Any] = {"batch_key": arguments.batch_key, "config": config, "modalities": names}
    data = StoreDataModule(arguments.store, **options, example_cells=size)
    describe_data(data.store, names)
    print(f"libraries: {peak_of_process():,.0f} MB")
    start = time.perf_counter()
    kind.setup_mudata(data.example, batch_key=arguments.batch_key, modalities=LAYERS[arguments.model])
    model = kind(data.example)
    print(
        f"model made of {model.adata.n_obs:,} cells in {time.perf_counter() - start:.0f} s: {peak_of_process():,.0f} MB"
    )
    training: dict[str, Any] = {"max_epochs": arguments.max_epochs, "accelerator": "cpu", "enable_progress_bar": False}
    start, cells = time.perf_counter(), 0.95 * data.n_obs
    if arguments.in_memory:
        if arguments.minibatches is not None:
            training |= {"limit_train_batches": arguments.minibatches, "limit_val_batches": 0, "early_stopping": False}
            cells = arguments.minibatches * arguments.minibatch
        model.train(batch_size=arguments.minibatch, train_size=0.95, **training)
    else:
        data.train(model, **training)
    seconds = time.perf_counter() - start
    speed = cells * arguments.max_epochs / seconds
    print(f"trained in {seconds:.0f} s, {speed:,.0f} cells/s, elbo {model.history['elbo_train'].iloc[-1].item():,.1f}")
    if arguments.minibatches is not None:
        print(f"peak {peak_of_process():,.0f} MB")
        return
    latent = model.get_latent_representation() if arguments.in_memory else data.latent(model)
    print(f"latent {latent.shape}, peak {peak_of_process():,.0f} MB")


if __name__ == "__main__":
    main()
