"""The model: networks, objective, noise, priors, and the original's weights."""

from liam_scale.model.config import ModelConfig, ModelData, ModelName, resolve

__all__ = ["ModelConfig", "ModelData", "ModelName", "resolve"]
