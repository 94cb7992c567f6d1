"""Sweeps: running, monitoring and comparing many runs that differ in a few config fields."""
