"""Attacks: searches in a ball around an image for a point the model gets wrong."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, "adversary", Adversary="base")
