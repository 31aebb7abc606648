"""Metrics: pure functions on features and scores, and the records that evaluations write."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__, "metric", "space", "score", Metric="base", Record="base", Subject="base", SampleSet="base"
)
