"""LSL_AE, of the joint embedding of NeurIPS 2021, re-implemented in torch from the team's published program (Keras).

Known: RNA by scanpy's variable genes over batches, the other modality by features of 3% of the cells; an autoencoder:
dropout 0.1, 64 ReLU units a modality with a penalty for weights that are not orthonormal, 64 linear units for both
(the latent), 128 ReLU units, and ReLU outputs; squared error; Adam at 0.0001, minibatches of 32, 600 epochs, stopped
after 20 without a better validation loss on the last fifth of the cells, without going back to the best. Nothing of the
batch is removed.
Assumed: the challenge's normalized matrices, which the team took, are here log RNA of 10,000 counts, centred log-ratios
of ADT and ATAC as present or absent. The team fixed its seeds; here they are given.
"""

import argparse
from typing import Any

from contract import compete, normalized

WIDTH = 64


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, int]:
    import torch

    torch.manual_seed(arguments.seed)
    x = [torch.as_tensor(values, dtype=torch.float32) for values in chosen(data, arguments.batch_key)]
    model = autoencoder([one.shape[1] for one in x])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, eps=1e-7)
    n = int(0.8 * len(x[0]))
    train, held = [one[:n] for one in x], [one[n:] for one in x]
    best, since, epochs = float("inf"), 0, 0
    while since < 20 and epochs < (arguments.max_epochs or 600):
        model.train()
        for rows in torch.randperm(n).split(32):
            optimizer.zero_grad()
            loss(model, [one[rows] for one in train]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            now = float(loss(model, held))
        best, since = (now, 0) if now < best else (best, since + 1)
        epochs += 1
    with torch.no_grad():
        return latent(model, x).numpy(), epochs


def chosen(data: Any, batch_key: str) -> list[Any]:
    import anndata
    import numpy
    import scanpy

    values = []
    for name, modality in data.mod.items():
        x = (modality.X.toarray() > 0).astype(float) if name == "atac" else normalized(name, modality.X)
        if name == "rna":
            cells = anndata.AnnData(x, obs=data.obs[[batch_key]].astype("category"))
            scanpy.pp.highly_variable_genes(cells, batch_key=batch_key)
            x = x[:, cells.var["highly_variable"].to_numpy()]
        else:
            x = x[:, numpy.asarray((modality.X > 0).sum(axis=0)).ravel() >= int(0.03 * len(x))]
        values.append(x)
    return values


def autoencoder(widths: list[int]) -> Any:
    import torch
    from torch import nn

    def dense(before: int, after: int) -> Any:
        layer = nn.Linear(before, after)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    model = nn.ModuleDict(
        {
            "encoders": nn.ModuleList(dense(width, WIDTH) for width in widths),
            "bottleneck": dense(WIDTH * len(widths), WIDTH),
            "inverse": dense(WIDTH, WIDTH * len(widths)),
            "decoders": nn.ModuleList(dense(WIDTH * len(widths), width) for width in widths),
        }
    )
    torch.nn.init.uniform_(model["bottleneck"].weight, -0.05, 0.05)
    return model


def latent(model: Any, x: list[Any]) -> Any:
    import torch
    from torch.nn import functional

    pairs = zip(model["encoders"], x, strict=True)
    hidden = [torch.relu(layer(functional.dropout(one, 0.1, model.training))) for layer, one in pairs]
    return model["bottleneck"](torch.cat(hidden, dim=1))


def loss(model: Any, x: list[Any]) -> Any:
    import torch
    from torch.nn import functional

    hidden = torch.relu(model["inverse"](latent(model, x)))
    errors = [
        functional.mse_loss(torch.relu(layer(hidden)), one) for layer, one in zip(model["decoders"], x, strict=True)
    ]
    penalties = [
        torch.linalg.matrix_norm(layer.weight @ layer.weight.T - torch.eye(WIDTH)) for layer in model["encoders"]
    ]
    return sum(errors) + sum(penalties)


if __name__ == "__main__":
    compete(fit, "torch", "scanpy")
