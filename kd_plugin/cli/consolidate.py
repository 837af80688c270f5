"""``kd-plugin consolidate``: one ordinary directory out of a checkpoint in ZeRO shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """\
Joins the ZeRO shards of checkpoint-N on the CPU into safetensors that from_pretrained loads, with tokenizer,
configuration and lineage. Needs host memory for the float32 weights twice. Shards are pickles: trust the checkpoint.

With --universal it writes a checkpoint that any number of ranks can resume from, in DIR-universal.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="kd-plugin consolidate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint-N directory of a run under DeepSpeed")
    parser.add_argument("--output", type=Path, help="a new directory; left out, DIR-consolidated or DIR-universal")
    parser.add_argument("--dtype", default="bfloat16", help="of the written weights (bfloat16)")
    parser.add_argument("--universal", action="store_true", help="keep the optimizer, for a run with other ranks")
    parser.add_argument("--workers", type=int, default=1, help="processes that convert, with --universal (1)")
    arguments = parser.parse_args(argv)
    from kd_plugin.launch.consolidate import consolidate
    from kd_plugin.launch.universal import to_universal

    directory = arguments.directory
    kind = "universal" if arguments.universal else "consolidated"
    output = arguments.output or directory.with_name(f"{directory.name}-{kind}")
    if arguments.universal:
        to_universal(directory, output, workers=arguments.workers)
        print(f"Any number of ranks can go on from {output}: resume_from_checkpoint in TRL or ckpt_path in Lightning.")
        return 0
    print(f"The student and its lineage are in {consolidate(directory, output, dtype=arguments.dtype)}.")
    return 0
