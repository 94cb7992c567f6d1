"""Pretraining vision encoders by captioning, in JAX."""

__version__ = "0.1.0"
