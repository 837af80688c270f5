"""``kd-plugin demo``: a small real model distilled both ways, with its lineage, in minutes on two CPU cores.

state.py holds the settings and keeps two runs apart, prompts.py the bundled questions, model.py finds the teacher and
cuts the student, stages.py does the work and run.py shows it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

_DESCRIPTION = """\
Distil a small real model, SmolLM2-135M-Instruct, into fewer layers: first offline from a teacher cache, then
on-policy from a panel of two teachers. Then verify the license lineage of each checkpoint. Takes some minutes on
two CPU cores, and writes to --output_dir only. Called again it goes on where it was, with the same settings;
--fresh deletes what it wrote there and starts again. Exit codes: 0 done and verified, 1 refused or failed,
2 a checkpoint's files were changed, 3 a checkpoint has no lineage.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    from kd_plugin.cli.parsing import parse_settings
    from kd_plugin.demo.state import DemoConfig

    parsed = parse_settings(
        DemoConfig,
        argv,
        command="demo",
        description=_DESCRIPTION,
        defaults=DemoConfig.smoke() if "--smoke" in argv else None,
        flags={
            "fresh": "Delete what an earlier demo wrote there; start again.",
            "smoke": "Every step, but tiny: is everything installed?",
        },
    )
    if parsed.shown():
        return 0

    # Before torch is loaded. With the default policy two OpenMP processes slow each other down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from kd_plugin.demo.run import run_demo
    from kd_plugin.demo.stages import make_console

    return run_demo(parsed.settings, make_console(), fresh="fresh" in parsed.flags)
