"""liam: one network over any list of modalities.

Shapes: B cells, F features, H hidden units, L latent dimensions, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liam_scale.model.config import ModelConfig, ModelData, parameter_key, resolve
from liam_scale.model.decoders import Adversary, NegativeBinomialDecoder, NegativeMultinomialDecoder
from liam_scale.model.encoders import Encoded, LatentEncoder, ModalityEncoder
from liam_scale.model.layers import BlockOptions, Draw, Gaussian
from liam_scale.model.noise import Noise
from liam_scale.model.objective import (
    CellTerms,
    Objective,
    kl_latent,
    kl_library,
    modality_masks,
    reverse_gradient,
    sample_cross_entropy,
)
from loaders.minibatch import Minibatch


@dataclass(frozen=True)
class Inference:
    """What the encoders say of the cells.

    Attributes
    ----------
    encoded
        Per modality: hidden layers and library posterior.
    latent
        Posterior before the softmax, (B, L).
    z
        (B, L) softmax of a draw; rows sum to 1.
    log_library
        Per modality with a library encoder (B,) draw.
    """

    encoded: Mapping[str, Encoded]
    latent: Gaussian
    z: Tensor
    log_library: Mapping[str, Tensor]


class Liam(nn.Module):
    """liam (Rautenstrauch & Ohler, Nucleic Acids Research 2024, e52) for RNA, ATAC, ADT, others, any mosaic of them.

    Parameters
    ----------
    config
        Options; a field that is None takes the value its model's name stands for.
    data
        Features, samples and library priors.
    seed
        Of the first weights.

    Raises
    ------
    ValueError
        If options contradict each other or the data.
    """

    def __init__(self, config: ModelConfig, data: ModelData, *, seed: int = 0) -> None:
        super().__init__()
        self.config = _resolve_single(config, data)
        self.data = data.select(self.config.modalities)
        self._weights = self.config.weight_by_modality()
        draw = Draw(seed)
        self.encoders = nn.ModuleDict(
            {parameter_key(name): self._encoder(name, draw.at(name)) for name in self.modalities}
        )
        self.latent_encoder = LatentEncoder(
            len(self.modalities),
            self.config.n_hidden,
            self.num_latent,
            num_samples=data.num_samples if self.config.conditional_encoder else 0,
            options=self._encoder_options,
            draw=draw.at("z"),
        )
        self.decoders = nn.ModuleDict(
            {parameter_key(name): self._decoder(name, draw.at(f"{name}.decoder")) for name in self.modalities}
        )
        self.adversaries = nn.ModuleDict()
        has_adversary = self.config.adversarial and data.num_samples > 1 and not data.covariates
        self.adversary = (
            Adversary(self.num_latent, data.num_samples, options=self._decoder_options, draw=draw.at("adversary"))
            if has_adversary
            else None
        )
        if self.config.adversarial:
            for number, (column, values) in enumerate(data.covariates.items()):
                self._add_adversary(str(number), values, draw.at(f"adversary.{column}"))
        for name in self.modalities:
            self._register_prior(name)

    def _add_adversary(self, number: str, values: Sequence[str], draw: Draw) -> None:
        """Of one of several covariates, unless it has one value."""
        codes = {value: code for code, value in enumerate(dict.fromkeys(values))}
        table = torch.tensor([codes[value] for value in values])
        self.register_buffer(f"covariate_{number}", table, persistent=False)
        if len(codes) > 1:
            self.adversaries[number] = Adversary(self.num_latent, len(codes), options=self._decoder_options, draw=draw)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.config.modalities

    @property
    def num_latent(self) -> int:
        assert self.config.n_latent is not None
        return self.config.n_latent

    @property
    def _encoder_options(self) -> BlockOptions:
        config = self.config
        return BlockOptions(
            config.use_batch_norm_encoder, config.use_layer_norm_encoder, config.dropout_rate, config.impl
        )

    @property
    def _decoder_options(self) -> BlockOptions:
        config = self.config
        return BlockOptions(config.use_batch_norm_decoder, config.use_layer_norm_decoder, impl=config.impl)

    def encoder(self, modality: str) -> ModalityEncoder:
        return self.encoders[parameter_key(modality)]  # type: ignore[return-value]

    def decoder(self, modality: str) -> NegativeBinomialDecoder | NegativeMultinomialDecoder:
        return self.decoders[parameter_key(modality)]  # type: ignore[return-value]

    def _is_multinomial(self, name: str) -> bool:
        return self.data.kinds[name].likelihood == "NM"

    def _encoder(self, name: str, draw: Draw) -> ModalityEncoder:
        return ModalityEncoder(
            self.data.num_features[name],
            self.config.n_hidden,
            log1p=self.data.kinds[name].transform == "log1p",
            is_conditional=bool(self.config.conditional_encoder),
            has_library=not self._is_multinomial(name) or self.config.use_atac_libsize,
            num_samples=self.data.num_samples,
            options=self._encoder_options,
            impl=self.config.impl,
            draw=draw,
        )

    def _decoder(self, name: str, draw: Draw) -> NegativeBinomialDecoder | NegativeMultinomialDecoder:
        config, samples = self.config, self.data.num_samples
        sizes = (self.num_latent + len(self.data.continuous), config.n_hidden, self.data.num_features[name])
        seen = samples if config.conditional_decoder else 0
        if self._is_multinomial(name):
            return NegativeMultinomialDecoder(
                *sizes,
                uses_library=config.use_atac_libsize,
                num_dispersions=samples if config.dispersion_atac == "batch" else 0,
                likelihood=config.likelihood,
                num_samples=seen,
                options=self._decoder_options,
                impl=config.impl,
                precision=config.precision,
                draw=draw,
            )
        by_sample = config.dispersion_adt == "ADT-batch" if name == "adt" else config.dispersion_rna == "gene-batch"
        return NegativeBinomialDecoder(
            *sizes,
            num_dispersions=samples if by_sample else 0,
            num_samples=seen,
            options=self._decoder_options,
            impl=config.impl,
            precision=config.precision,
            draw=draw,
        )

    def _register_prior(self, name: str) -> None:
        samples = self.data.num_samples
        mean = self.data.prior_mean.get(name, (0.0,) * samples)
        variance = self.data.prior_variance.get(name, (1.0,) * samples)
        key = parameter_key(name)
        self.register_buffer(f"prior_mean_{key}", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer(f"prior_variance_{key}", torch.tensor(variance, dtype=torch.float32))

    def infer(self, minibatch: Minibatch, noise: Noise) -> Inference:
        """Encode the cells and draw z and library sizes."""
        encoded = {
            name: self.encoder(name)(minibatch.counts[name], minibatch.sample, noise) for name in self.modalities
        }
        latent = self.latent_encoder([encoded[name].hidden for name in self.modalities], minibatch.sample, noise)
        log_library = {
            name: e.library.sample(noise, f"{name}.library")[:, 0]
            for name, e in encoded.items()
            if e.library is not None
        }
        z = torch.softmax(latent.sample(noise, "z"), dim=1)
        return Inference(encoded, latent, z, log_library)

    def cell_terms(
        self,
        minibatch: Minibatch,
        inference: Inference,
        *,
        cell_weight: float | Tensor = 1.0,
        num_global_with: Mapping[str, int | Tensor] | None = None,
    ) -> CellTerms:
        """Every term of the objective for every cell; see `objective.CellTerms`."""
        sample = minibatch.sample
        masks = modality_masks(minibatch, self.modalities)
        inputs_BK = self.decoder_inputs(inference.z, minibatch.obs)
        kernel_losses: list[Tensor] = []
        reconstruction, kl_libraries = {}, {}
        for name in self.modalities:
            weight = cell_weight * self._weights[name] if name in self._weights else cell_weight
            coupled = {}
            is_coupled = self.config.likelihood == "original" and self._is_multinomial(name)
            if is_coupled and num_global_with is not None:
                coupled = {"num_global_with": num_global_with[name], "num_global": minibatch.num_global}
                coupled["cell_scale"] = weight  # type: ignore[assignment]
            kernel_loss, log_likelihood = self.decoders[parameter_key(name)].log_likelihood(  # type: ignore[operator]
                minibatch.counts[name],
                inputs_BK,
                inference.log_library.get(name),
                sample,
                cell_weight_B=weight * masks[name].to(inference.z.dtype),
                **coupled,
            )
            kernel_losses.append(kernel_loss)
            reconstruction[name] = -log_likelihood
            library = inference.encoded[name].library
            if library is not None:
                kl_libraries[name] = kl_library(library, *self.library_prior(name), sample)
        adversarial = self._adversarial(inference.z, sample)
        kl_z = kl_latent(inference.latent)
        if minibatch.counted is not None:
            kl_z = kl_z * minibatch.counted
            adversarial = {name: values * minibatch.counted for name, values in adversarial.items()}
        return CellTerms(reconstruction, kl_libraries, kl_z, adversarial, masks, kernel_losses)

    def decoder_inputs(self, z_BL: Tensor, numbers: Mapping[str, Tensor] | None) -> Tensor:
        """(B, L + columns) the latent space with standardised numbers of the cells, by column; None: their means."""
        names = list(self.data.continuous)
        if not names:
            return z_BL
        if numbers is None:
            return torch.cat([z_BL, z_BL.new_zeros(len(z_BL), len(names))], dim=1)
        return torch.cat([z_BL, torch.stack([numbers[name] for name in names], dim=1).to(z_BL.dtype)], dim=1)

    def _adversarial(self, z_BL: Tensor, sample_B: Tensor) -> dict[str, Tensor]:
        """(B,) cross entropy of each adversary, which reads z through a gradient reversal."""
        found = {}
        if self.adversary is not None:
            logits = self.adversary(reverse_gradient(z_BL), sample_B)
            found["adversarial_loss"] = sample_cross_entropy(logits, sample_B)
        for number, column in enumerate(self.data.covariates):
            if str(number) in self.adversaries:
                logits = self.adversaries[str(number)](reverse_gradient(z_BL), sample_B)
                codes = self.get_buffer(f"covariate_{number}")[sample_B]
                found[f"adversarial_loss_{column}"] = sample_cross_entropy(logits, codes)
        return found

    @property
    def _alphas(self) -> dict[str, float]:
        """Weight of each adversary, by the name of its term."""
        alpha, own = self.config.alpha, self.config.alpha_by_column()
        assert alpha is not None
        return {"adversarial_loss": alpha, **{f"adversarial_loss_{c}": own.get(c, alpha) for c in self.data.covariates}}

    def library_prior(self, name: str) -> tuple[Tensor, Tensor]:
        """(S,) mean and (S,) variance of the log total of a modality."""
        key = parameter_key(name)
        return self.get_buffer(f"prior_mean_{key}"), self.get_buffer(f"prior_variance_{key}")

    def forward(
        self,
        minibatch: Minibatch,
        *,
        step: int,
        seed: int,
        kl_weight: float | Tensor,
        cell_weight: float | Tensor,
        num_global_with: Mapping[str, int | Tensor] | None = None,
        noise: Mapping[str, Tensor] | None = None,
        noise_key: Tensor | None = None,
    ) -> Objective:
        """Objective of the local cells of a minibatch.

        Parameters
        ----------
        minibatch
            This rank's cells, on the model's device.
        step, seed
            Keys of the noise; `step` counts over the whole run.
        kl_weight
            Warm-up weight of the latent divergence; library divergences always have 1.
        cell_weight
            Weight of each cell: ranks / cells of the global minibatch, so that DDP's mean is the mean over cells.
        num_global_with
            Only for `likelihood="original"` on several ranks: cells of the global minibatch in each modality's mask
            (`num_cells_with`, summed over ranks). None: this rank holds the whole minibatch.
        noise
            Normal noise to use instead of drawn: `z` (B, L), `<modality>.library` (B, 1).
        noise_key
            Key of the noise on the device, in the place of step and seed; see `model.noise.Noise`.

        Returns
        -------
        Objective
            Differentiable loss and detached terms, both over local cells.
        """
        source = Noise(seed=seed, step=step, place=minibatch.place, given=noise or {}, key=noise_key)
        inference = self.infer(minibatch, source)
        terms = self.cell_terms(minibatch, inference, cell_weight=cell_weight, num_global_with=num_global_with)
        return terms.objective(kl_weight=kl_weight, alphas=self._alphas, cell_weight=cell_weight)

    def num_cells_with(self, minibatch: Minibatch) -> dict[str, Tensor]:
        """() local cells in the mask of each modality; summed over ranks it is `num_global_with`."""
        masks = modality_masks(minibatch, self.modalities)
        return {name: mask.sum() for name, mask in masks.items()}

    @torch.no_grad()
    def terms_by_cell(
        self, minibatch: Minibatch, *, step: int, seed: int, num_global_with: Mapping[str, int | Tensor] | None = None
    ) -> dict[str, Tensor]:
        """(B,) terms of the objective, by name, with the noise of a step."""
        inference = self.infer(minibatch, Noise(seed=seed, step=step, place=minibatch.place))
        return self.cell_terms(minibatch, inference, num_global_with=num_global_with).by_name()

    @torch.no_grad()
    def latent(self, minibatch: Minibatch) -> tuple[Tensor, Tensor]:
        """Posterior of the latent space before its softmax, without dropout or noise: mean and variance, (B, L)."""
        hidden = [
            self.encoder(name)(minibatch.counts[name], minibatch.sample, None, with_library=False).hidden
            for name in self.modalities
        ]
        posterior = self.latent_encoder(hidden, minibatch.sample, None)
        return posterior.mean, posterior.variance

    def keep_gradients(self) -> None:
        """Have the next step write the gradients of the large weights where those of this one stand.

        To be called after the optimizer's step and before `zero_grad(set_to_none=True)`. Fresh memory of 120 MB costs
        0.1 to 0.4 s of page faults a step; under DDP (`gradient_as_bucket_view`) the gradients stand in its buckets,
        so that nothing need be copied there.
        """
        for module in [*self.encoders.values(), *self.decoders.values()]:
            module.keep_gradients()  # type: ignore[operator]


def _resolve_single(config: ModelConfig, data: ModelData) -> ModelConfig:
    configs: Sequence[ModelConfig] = resolve(config, modalities=data.modalities)
    if len(configs) != 1:
        raise ValueError(
            f"model: got {config.model}, which is {len(configs)} models; build one Liam for each of resolve(...)"
        )
    if config.model == "vae" and data.num_samples != 1:
        raise ValueError(
            f"samples: got {data.num_samples} for model vae, which sees no sample; give ModelData one sample"
        )
    return configs[0]
