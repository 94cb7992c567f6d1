"""Saving, validating and restoring checkpoints, and initializing runs from them."""
