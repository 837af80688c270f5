"""Files that start the parts of a panel on a cluster in order, check their health and stop them together.

slurm.py and kubernetes.py write one file each of the same parts. The examples in ``integrations/`` are those of
``EXAMPLE``, and are made anew by ``python -m kd_plugin.launch.jobs.write integrations``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kd_plugin.launch.jobs.kubernetes import manifest
from kd_plugin.launch.jobs.parts import Parts, Server
from kd_plugin.launch.jobs.slurm import script

SLURM, KUBERNETES = "panel_with_engines.sbatch", "panel_with_engines.yaml"
EXAMPLE = Parts((Server("hidden", "hidden"), Server("listed", "listed"), Server("engine", "rollouts")), trainers=2)


def write_jobs(parts: Parts, slurm: Path, kubernetes: Path) -> list[Path]:
    """Write one file into each of two directories, which are made where they are missing, and return their paths."""
    files = {
        slurm / SLURM: script(parts, str(slurm / SLURM)),
        kubernetes / KUBERNETES: manifest(parts, str(kubernetes / KUBERNETES)),
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(files)


if __name__ == "__main__":
    write_jobs(EXAMPLE, Path(sys.argv[1], "slurm"), Path(sys.argv[1], "kubernetes"))
