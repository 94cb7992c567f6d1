"""Metrics, console progress, step timing, FLOP counts and tables of results."""
