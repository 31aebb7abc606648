"""Samplers: draw images by descent on an energy.  The commands that draw sets of images are in ``sampling``."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, "sampler", Sampler="base")
