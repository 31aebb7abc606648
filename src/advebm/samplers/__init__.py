"""Samplers: images drawn downhill on an energy.  Commands that draw sets of them are in sampling."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, "sampler", Sampler="base")
