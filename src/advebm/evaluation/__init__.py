"""Evaluation of runs by metrics (which are in ``advebm.metrics``), suites of metrics, and comparison of runs."""
