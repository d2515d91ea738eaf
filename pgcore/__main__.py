"""``python -m pgcore`` is the same as ``pgcore``."""

import sys

from pgcore.cli import main

sys.exit(main())
