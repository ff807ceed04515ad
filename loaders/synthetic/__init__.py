"""Toy data that identifies itself, and simulated atlases of any size with known truth."""

from loaders.synthetic.identifying import identifying_counts, identifying_store, identifying_value
from loaders.synthetic.simulate import simulate, simulate_mudata

__all__ = ["identifying_counts", "identifying_store", "identifying_value", "simulate", "simulate_mudata"]
