"""Probes: classifiers fitted to the features of a frozen encoder, and what they share."""
