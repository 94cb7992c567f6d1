"""Sweeps: many runs that differ in a few fields, run, looked up and compared together."""
