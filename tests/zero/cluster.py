"""Stands in for what a cluster brings and this machine lacks: Slurm's srun and scontrol, pdsh and ssh, nodes, vLLM.

The stand-ins only start processes, here, in place of other machines; what is started is the real thing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.zero.ranks import CHECKOUT, environment

NODES = ("127.0.0.1", "localhost", "127.0.0.2", "127.0.0.3", "127.0.0.4")
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # of the two network namespaces

_SRUN = """\
#!{python}
import os, signal, subprocess, sys
nodes, arguments = os.environ["SLURM_JOB_NODELIST"].split(","), sys.argv[1:]
while arguments[0].startswith("--"):
    name, _, value = arguments.pop(0).partition("=")
    if not value:
        value = arguments.pop(0)
    if name == "--nodelist":
        nodes = value.split(",")
    elif name == "--exclude":
        nodes = [node for node in nodes if node not in value.split(",")]
running = [
    subprocess.Popen(arguments, env={{**os.environ, "SLURM_NODEID": str(i), "SLURM_PROCID": str(i)}})
    for i in range(len(nodes))
]
signal.signal(signal.SIGTERM, lambda *caught: [process.terminate() for process in running])
sys.exit(max([process.wait() for process in running], key=abs))
"""
_SCONTROL = """\
#!/bin/bash
[[ "$1 $2" == "show hostnames" ]] && tr , '\\n' <<< "$3"
"""
_SSH = """\
#!/bin/bash
[[ "$*" == *"hostname -I" ]] && echo 127.0.0.1
exit 0
"""
_PDSH = """\
#!{python}
import subprocess, sys
arguments = sys.argv[1:]
hosts = arguments[arguments.index("-w") + 1].split(",")
command = " ".join(arguments[arguments.index("-w") + 2 :])
running = [subprocess.Popen(["bash", "-c", command.replace("%n", str(i))]) for i in range(len(hosts))]
sys.exit(max([process.wait() for process in running], key=abs))
"""
_VLLM = """\
#!/bin/bash
exec {python} -m tests.zero.serve "$@"
"""


def install(directory: Path) -> None:
    """Write the stand-ins into ``directory``, which then goes in front of PATH."""
    directory.mkdir(parents=True)
    scripts = {"srun": _SRUN, "scontrol": _SCONTROL, "ssh": _SSH, "pdsh": _PDSH, "vllm": _VLLM}
    for name, text in scripts.items():
        path = directory / name
        path.write_text(text.format(python=sys.executable) if "{python}" in text else text)
        path.chmod(0o755)


def rank_environment(commands: Path, **more: str) -> dict[str, str]:
    """Return an environment in which shipped commands find the stand-ins, and their ranks gloo."""
    path = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    python = [str(CHECKOUT / "tests" / "zero" / "cpu_site"), str(CHECKOUT)]
    return environment(
        PATH=os.pathsep.join(path), PYTHONPATH=os.pathsep.join(python), GLOO_FROM_THE_START="wanted", **more
    )
