"""``python -m advebm``."""

import sys

from advebm.cli import main

sys.exit(main())
