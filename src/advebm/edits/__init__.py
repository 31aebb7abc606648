"""Edits of images by a model's energy.  The command's reading and writing of files is in ``sampling.edit_job``."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, "edit", Edit="base", Edited="base", Problem="base", box_hole="base")
