"""Networks: normalisation, a backbone and a head; saving, loading and averaging them."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    "backbone",
    Backbone="network",
    Network="network",
    Architecture="network",
    searching="modes",
    using="modes",
)
