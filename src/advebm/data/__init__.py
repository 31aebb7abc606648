"""Image data: sources, training order and augmentation."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__, "source", "outlier", Source="sources", Data="sources", Images="sources"
)
