"""advebm: adversarially trained energy-based models."""

__version__ = "0.1.0"
