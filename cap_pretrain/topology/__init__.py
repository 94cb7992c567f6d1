"""Predicting memory and step time of a run on a TPU pod with the TPU compiler, without any TPU."""
