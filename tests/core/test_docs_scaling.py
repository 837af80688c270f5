"""The tables of docs/scaling.md are what the plan's formulae give."""

import re
import shlex
from pathlib import Path

import pytest

from kd_plugin.cli.parsing import parse_settings
from kd_plugin.planner.settings import PlanSettings, planned
from kd_plugin.planner.time import traffic

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"```bash\n(kd-plugin plan [^\n]+)\n```\n(.*?)(?=```bash|\Z)", PAGE, re.DOTALL)
NODES = [1, 2, 4, 8, 16, 32, 64]


def sent(command, nodes):
    """Return what a rank sends under each stage, and the cluster."""
    words = [str(nodes) if word == "NODES" else word for word in shlex.split(command)[2:]]
    settings = parse_settings(PlanSettings, words, command="plan", description="").settings
    run, cluster = planned(settings)
    return [traffic(run, stage, cluster.ranks) for stage in (1, 2, 3)], cluster


@pytest.mark.parametrize(("command", "text"), BLOCKS, ids=[command[15:60] for command, _ in BLOCKS])
def test_the_tables_are_what_the_formulae_give(command, text):
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert [int(nodes) for nodes, _ in rows] == NODES
    for nodes, cells in rows:
        (one, two, three), cluster = sent(command, int(nodes))
        if "--method offline" in command:
            bytes_sent = [stage.gradients + stage.weights for stage in (one, two, three)]
        else:
            bytes_sent = [three.teachers, three.generation]
        shown = [f"{size / 1e9:.0f}" for size in bytes_sent] + [f"{size / cluster.link:.1f}" for size in bytes_sent]
        assert cells.split(" | ") == shown


def test_both_commands_are_there():
    assert len(BLOCKS) == 2
