"""Adversarial attacks: searches near an image for an input that the model misclassifies."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, "adversary", Adversary="base")
