"""The model: networks, objective, noise, priors, and the original's weights."""

from liam_scale.model.config import ModelConfig, ModelData, ModelName, check_ranks, parameter_key, resolve
from liam_scale.model.liam import Inference, Liam
from liam_scale.model.logistic_normal import logistic_normal_mean
from liam_scale.model.objective import CellTerms, Objective
from liam_scale.model.priors import library_priors

__all__ = [
    "CellTerms",
    "Inference",
    "Liam",
    "ModelConfig",
    "ModelData",
    "ModelName",
    "Objective",
    "check_ranks",
    "library_priors",
    "logistic_normal_mean",
    "parameter_key",
    "resolve",
]
