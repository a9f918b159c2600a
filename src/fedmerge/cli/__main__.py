"""``python -m fedmerge.cli``."""

import sys

from fedmerge.cli import main

sys.exit(main())
