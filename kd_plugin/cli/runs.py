"""Around a run: ``kd-plugin doctor``, ``kd-plugin trace``, ``kd-plugin report`` and ``kd-plugin consolidate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from kd_plugin.cli.parsing import Parser, parse_settings
from kd_plugin.errors import ConfigError
from kd_plugin.launch.doctor import LaunchSettings, check_launch, own_problems, with_plan

_DOCTOR = """\
Alone it checks this machine: servers, memory, disk, and locks that a killed build of a DeepSpeed op left behind.
With --launch run it under the launcher that will train, with as many nodes and ranks:
  torchrun --nnodes 2 --nproc_per_node 8 ... -m kd_plugin doctor --launch --output_dir /shared/out
That also compares versions, teachers and caches of all ranks, runs each kind of collective, and sees whether the
output directory is shared. Exit codes: 0 good, 1 a problem; the rank that differs is named.
"""
_TRACE = """\
Turn saved rollouts into a self-contained HTML page: each token is coloured by the correction that it got, and a tap
shows what each teacher would have written there. It filters by domain, teacher and step, and needs no network.

Rollouts are saved by the panel's trainer where its config says `save_rollouts: 4` (rows of each logging step).

example:
  kd-plugin trace out -o trace.html              everything that the run in `out` saved
  kd-plugin trace out/rollouts/step-00000010-rank-0.jsonl -o step-10.html

The page holds the prompts and responses themselves: share it as you would share the data.
Exit codes: 0 written, 1 refused, 2 wrong usage.
"""
_REPORT = """\
Draw a run's own logs as one self-contained HTML page: losses, divergences by teacher, response lengths, guards,
evaluation. It reads trainer_state.json of the latest checkpoint (TRL, transformers) or metrics.csv (Lightning's
CSVLogger).

example:
  kd-plugin report out -o report.html

Exit codes: 0 written, 2 no logs there, or wrong usage.
"""
_CONSOLIDATE = """\
Joins the ZeRO shards of checkpoint-N on the CPU into safetensors that from_pretrained loads, with tokenizer,
configuration and lineage. Needs host memory for the float32 weights twice. Shards are pickles: trust the checkpoint.

With --universal it writes a checkpoint that any number of ranks can resume from, in DIR-universal.
Exit codes: 0 written, 1 refused, 2 wrong usage.
"""


def doctor(argv: Sequence[str]) -> int:
    """Run ``kd-plugin doctor ARGV`` and return its exit code."""
    flags = {"launch": "check the launch; every rank of it must run this"}
    parsed = parse_settings(LaunchSettings, argv, command="doctor", description=_DOCTOR, flags=flags)
    if parsed.shown():
        return 0
    if "launch" not in parsed.flags:
        if parsed.settings.teachers or parsed.settings.caches:
            raise ConfigError("teachers and caches are compared between ranks: add --launch, under torchrun.")
        return _report_problems("this machine", own_problems(with_plan(parsed.settings)))
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
            _report_problems(f"{dist.get_world_size()} ranks", problems)
    finally:
        dist.destroy_process_group()
    return 1 if problems else 0


def _report_problems(what: str, problems: Sequence[str]) -> int:
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{what}: " + ("good" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}"))
    return 1 if problems else 0


def trace(argv: Sequence[str]) -> int:
    """Run ``kd-plugin trace ARGV`` and return its exit code."""
    parser = Parser("kd-plugin trace", description=_TRACE)
    parser.add_argument("place", type=Path, help="a run's output_dir, its rollouts directory, or one file of it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page; an existing file is replaced")
    parser.add_argument("--limit", type=int, default=200, help="rollouts on the page, the latest; 200 if not given")
    parser.add_argument("--title", default=None, help="heading; the name of the place if not given")
    arguments = parser.parse_args(list(argv))
    if arguments.limit < 1:
        parser.error("--limit must be at least 1")

    from kd_plugin.monitor.traces import page, read_rollouts

    rows = read_rollouts(arguments.place)
    kept = rows[-arguments.limit :]
    _write(arguments.output, page(kept, arguments.title or arguments.place.resolve().name))
    left = f"; {len(rows) - len(kept)} earlier ones left out (--limit)" if len(kept) < len(rows) else ""
    print(f"{arguments.output}: {len(kept)} rollouts{left}")
    return 0


def report(argv: Sequence[str]) -> int:
    """Run ``kd-plugin report ARGV`` and return its exit code."""
    parser = Parser("kd-plugin report", description=_REPORT)
    parser.add_argument("place", type=Path, help="a run's output_dir, one of its checkpoints, or a log directory")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page; an existing file is replaced")
    parser.add_argument("--title", default=None, help="heading; the name of the place if not given")
    arguments = parser.parse_args(list(argv))
    from kd_plugin.monitor.report import read_logs
    from kd_plugin.monitor.report import report as page

    logs = read_logs(arguments.place)
    _write(arguments.output, page(logs, arguments.title or arguments.place.resolve().name))
    print(f"{arguments.output}: {len(logs)} logged values")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --output.") from error


def consolidate(argv: Sequence[str]) -> int:
    """Run ``kd-plugin consolidate ARGV`` and return its exit code."""
    parser = Parser("kd-plugin consolidate", description=_CONSOLIDATE)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint-N directory of a run under DeepSpeed")
    parser.add_argument("--output", type=Path, help="a new directory; left out, DIR-consolidated or DIR-universal")
    parser.add_argument("--dtype", default="bfloat16", help="of the written weights (bfloat16)")
    parser.add_argument("--universal", action="store_true", help="keep the optimizer, for a run with other ranks")
    parser.add_argument("--workers", type=int, default=1, help="processes that convert, with --universal (1)")
    arguments = parser.parse_args(list(argv))
    from kd_plugin.launch import checkpoints

    directory = arguments.directory
    kind = "universal" if arguments.universal else "consolidated"
    output = arguments.output or directory.with_name(f"{directory.name}-{kind}")
    if arguments.universal:
        checkpoints.to_universal(directory, output, workers=arguments.workers)
        print(f"Any number of ranks can go on from {output}: resume_from_checkpoint in TRL or ckpt_path in Lightning.")
        return 0
    print(f"The student and its lineage are in {checkpoints.consolidate(directory, output, dtype=arguments.dtype)}.")
    return 0
