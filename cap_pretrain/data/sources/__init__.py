"""Datasets as random-access sequences of examples: stored, generated, or parts of others."""
