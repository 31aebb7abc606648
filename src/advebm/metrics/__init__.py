"""Metrics: pure functions on features and scores, and the records that evaluations write."""
