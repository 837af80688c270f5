"""``python -m kd_plugin.lightning``; see ``cli``."""

import sys

from kd_plugin.lightning.cli import main

sys.exit(main())
