"""Metrics, computed from scores, captions or answers; no learner is involved."""
