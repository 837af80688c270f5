"""``kd-plugin doctor``: check what a long run relies on, here or on all ranks, and name the rank that differs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

from kd_plugin.cli.config import as_yaml, parse_settings
from kd_plugin.errors import ConfigError
from kd_plugin.launch.doctor import LaunchSettings, check_launch, own_problems, with_plan

_DESCRIPTION = """\
Alone it checks this machine: servers, memory, disk, and locks that a killed build of a DeepSpeed op left behind.
With --launch run it under the launcher that will train, with as many nodes and ranks:
  torchrun --nnodes 2 --nproc_per_node 8 ... -m kd_plugin doctor --launch --output_dir /shared/out
That also compares versions, teachers and caches of all ranks, runs each kind of collective, and sees whether the
output directory is shared. Exit codes: 0 good, 1 a problem; the rank that differs is named.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    flags = {"launch": "check the launch; every rank of it must run this"}
    parsed = parse_settings(LaunchSettings, argv, command="doctor", description=_DESCRIPTION, flags=flags)
    if parsed.print_only:
        print(as_yaml(parsed.settings))
        return 0
    if "launch" not in parsed.flags:
        if parsed.settings.teachers or parsed.settings.caches:
            raise ConfigError("teachers and caches are compared between ranks: add --launch, under torchrun.")
        return _report("this machine", own_problems(with_plan(parsed.settings)))
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "RANK and MASTER_ADDR are not set, so this is no launched rank. Run it under the launcher: torchrun "
            "--nproc_per_node N -m kd_plugin doctor --launch"
        )
    settings = with_plan(parsed.settings)
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=120))
    try:
        problems = check_launch(settings)
        if dist.get_rank() == 0:
            _report(f"{dist.get_world_size()} ranks", problems)
    finally:
        dist.destroy_process_group()
    return 1 if problems else 0


def _report(what: str, problems: Sequence[str]) -> int:
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{what}: " + ("good" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}"))
    return 1 if problems else 0
