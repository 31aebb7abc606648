"""The former name of :mod:`advebm.diagnostics.doctor`."""

from advebm.diagnostics.doctor import *  # noqa: F403
