"""Metrics on runs, suites of them, and runs side by side.  The metrics themselves are in metrics."""
