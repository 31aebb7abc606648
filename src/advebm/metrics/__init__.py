"""Metrics: functions of features and scores, measurements on models and samples, and their records."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__, "metric", "space", "score", Metric="base", Record="base", Subject="base", SampleSet="base"
)
