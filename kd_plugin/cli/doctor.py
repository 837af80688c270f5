"""``kd-plugin doctor --launch``: check on all ranks what a long run relies on, and name the rank that differs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

from kd_plugin.cli.config import as_yaml, parse_settings
from kd_plugin.errors import ConfigError
from kd_plugin.zero.launch_check import LaunchSettings, check_launch, with_plan

_DESCRIPTION = """\
Run it under the launcher that will train, with as many nodes and ranks:
  torchrun --nnodes 2 --nproc_per_node 8 ... -m kd_plugin doctor --launch --output_dir /shared/out
Compares versions, teachers and caches of all ranks, reaches servers, runs each kind of collective, and sees whether
memory and disk suffice and the output directory is shared. Exit codes: 0 good, 1 a rank differs; it is named.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    flags = {"launch": "check the launch; every rank of it must run this"}
    parsed = parse_settings(LaunchSettings, argv, command="doctor", description=_DESCRIPTION, flags=flags)
    if parsed.print_only:
        print(as_yaml(parsed.settings))
        return 0
    if "launch" not in parsed.flags:
        raise ConfigError("say what to check: --launch, under torchrun or accelerate launch.")
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
            for problem in problems:
                print(problem, file=sys.stderr)
            print(f"{dist.get_world_size()} ranks: " + ("good" if not problems else f"{len(problems)} problems"))
    finally:
        dist.destroy_process_group()
    return 1 if problems else 0
