"""Optimizers, learning-rate schedules, durations in steps, and reduce-on-plateau."""
