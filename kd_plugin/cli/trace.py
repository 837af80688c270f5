"""``kd-plugin trace``: saved rollouts as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_plugin.errors import ConfigError

_DESCRIPTION = """\
Turn saved rollouts into a self-contained HTML page: each token is coloured by the correction that it got, and a tap
shows what each teacher would have written there. It filters by domain, teacher and step, and needs no network.

Rollouts are saved by the panel's trainer where its config says `save_rollouts: 4` (rows of each logging step).

example:
  kd-plugin trace out -o trace.html              everything that the run in `out` saved
  kd-plugin trace out/rollouts/step-00000010-rank-0.jsonl -o step-10.html

The page holds the prompts and responses themselves: share it as you would share the data.
Exit codes: 0 written, 1 refused, 2 wrong usage.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="kd-plugin trace", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=Path, help="a run's output_dir, its rollouts directory, or one file of it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page; an existing file is replaced")
    parser.add_argument("--limit", type=int, default=200, help="rollouts on the page, the latest; 200 if not given")
    parser.add_argument("--title", default=None, help="heading; the name of the place if not given")
    arguments = parser.parse_args(argv)
    if arguments.limit < 1:
        parser.error("--limit must be at least 1")

    from kd_plugin.monitor.traces import page, read_rollouts

    rows = read_rollouts(arguments.place)
    kept = rows[-arguments.limit :]
    try:
        arguments.output.write_text(page(kept, arguments.title or arguments.place.resolve().name), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{arguments.output} cannot be written ({error.strerror}); choose another --output."
        ) from error
    left = f"; {len(rows) - len(kept)} earlier ones left out (--limit)" if len(kept) < len(rows) else ""
    print(f"{arguments.output}: {len(kept)} rollouts{left}")
    return 0
