"""The former name of :mod:`advebm.edits`."""

from advebm.edits.base import *  # noqa: F403
from advebm.edits.restore import *  # noqa: F403
from advebm.edits.transform import *  # noqa: F403
from advebm.metrics.unusual import *  # noqa: F403
