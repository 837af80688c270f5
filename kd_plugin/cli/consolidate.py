"""``kd-plugin consolidate``: one ordinary directory out of a checkpoint in ZeRO shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """\
Joins the ZeRO shards of checkpoint-N on the CPU into safetensors that from_pretrained loads, with tokenizer,
configuration and lineage. Needs host memory for the float32 weights twice. Shards are pickles: trust the checkpoint.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="kd-plugin consolidate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint-N directory of a run under DeepSpeed")
    parser.add_argument("--output", type=Path, help="a new directory; left out, DIR-consolidated")
    parser.add_argument("--dtype", default="bfloat16", help="of the written weights (bfloat16)")
    arguments = parser.parse_args(argv)
    from kd_plugin.zero.consolidate import consolidate

    directory = arguments.directory
    output = arguments.output or directory.with_name(directory.name + "-consolidated")
    print(f"The student and its lineage are in {consolidate(directory, output, dtype=arguments.dtype)}.")
    return 0
