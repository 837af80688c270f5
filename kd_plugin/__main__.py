"""``python -m kd_plugin`` is ``kd-plugin``."""

import sys

from kd_plugin.cli.main import main

sys.exit(main())
