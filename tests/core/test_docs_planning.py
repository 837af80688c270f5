"""The verdicts of docs/planning.md are what its commands say, and its arithmetic adds up."""

import ast
import json
import operator
import re
import shlex
from pathlib import Path

import pytest

from kd_plugin.cli.main import main
from kd_plugin.planner.run import GIB

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
# A command, and everything up to the next one
BLOCKS = re.findall(
    r"```bash\n(kd-plugin plan [^\n]+)\n```\n(.*?)(?=```bash|\Z)", PAGE.read_text().split("## A 32B")[1], re.DOTALL
)
COLUMNS = {"gradients": "gradients_peak", "gathered to generate": "generation", "KV cache": "kv_cache"}
OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow}


def tables(text):
    """Yield each table as (header cells, rows of cells), with the line that stands before it."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("|---"):
            rows = []
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in row.strip("|").split("|")])
            yield lines[i - 3], [cell.strip() for cell in lines[i - 1].strip("|").split("|")], rows


def value(node):
    """Compute sums, products, quotients, powers and max() of numbers."""
    if isinstance(node, ast.Expression):
        return value(node.body)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Call):
        assert node.func.id == "max"
        return max(map(value, node.args))
    return OPERATORS[type(node.op)](value(node.left), value(node.right))


@pytest.mark.parametrize(("command", "text"), BLOCKS, ids=[command[27:70] for command, _ in BLOCKS])
def test_the_page_says_what_its_command_says(command, text, capsys):
    assert main([*shlex.split(command)[1:], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    found = {option["name"]: option for option in plan["options"]}
    assert f"**Recommended: {plan['recommended']}.**" in text
    kinds = []
    for before, header, rows in tables(text):
        kinds.append(header[0])
        if header[0] == "layout":
            for name, *cells in rows:
                option = found[name]
                memory = {column: option["memory"].get(COLUMNS.get(column, column)) for column in header[1:-2]}
                shown = [f"{memory[column] / GIB:.1f}" for column in header[1:-2]]
                assert cells == [*shown, f"{option['seconds']['total']:.0f}", "yes" if option["fits"] else "no"]
        elif header[0] == "side":
            sides = plan["engines"]["seconds"]
            for side, arithmetic, seconds in rows:
                expected = sides["total" if side.startswith("step") else side]
                # Those of the trainers and their sum are written with the table's rounding
                exact = 1e-6 if side in ("generate", "sync", "score", "transfer") else 2e-2
                assert value(ast.parse(arithmetic.strip("`"), mode="eval")) == pytest.approx(expected, rel=exact), side
                assert seconds == f"{expected:.1f}"
            beside = plan["engines"]
            assert f"take {beside['gpu_hours']:.2f} GPU hours a step, {beside['cost']:.2f} at 2.50 an hour" in text
            assert f"R1 sends {beside['hidden_state_bytes'] / 1e9:.1f} GB of hidden states" in text
        else:
            layout = found[re.fullmatch(r"Step by step, (.+):", before)[1]]["memory"]
            total = 0.0
            for part, arithmetic, gib in rows[:-1]:
                size = value(ast.parse(arithmetic.strip("`"), mode="eval"))
                assert size == pytest.approx(layout[part], rel=1e-6), part
                assert gib == f"{size / GIB:.1f}"
                total += size
            assert total == pytest.approx(layout["peak"], rel=1e-6)
            assert rows[-1][-1] == f"{layout['peak'] / GIB:.1f}"
    assert kinds[0] == "layout"


@pytest.mark.parametrize(
    ("student", "option", "sentence"),
    [
        ("Qwen2.5-32B", "--lora_rank 16", "a step is then {seconds:.0f} s (`{option}`)"),
        ("Qwen2.5-32B", "--disk 10", "a parallel file system of 10 GB/s (`{option}`) makes it {seconds:.0f} s"),
        ("Llama-3.3-70B", "--lora_rank 16", "{minutes:.1f} with an adapter (`{option}`)"),
        ("Llama-3.3-70B", "", "Three hours become {minutes:.1f} minutes"),
    ],
)
def test_what_the_page_says_of_engines_otherwise(student, option, sentence, capsys):
    ((command, text),) = [(c, t) for c, t in BLOCKS if "--engine_gpus" in c and student in c]
    assert main([*shlex.split(command)[1:], *option.split(), "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["engines"]["seconds"]["total"]
    assert sentence.format(seconds=seconds, minutes=seconds / 60, option=option) in " ".join(text.split())


def test_all_three_clusters_have_their_verdict_and_its_arithmetic():
    with_arithmetic = [command for command, text in BLOCKS if "Step by step" in text]
    wanted = (
        ("Qwen/Qwen2.5-32B", 1),
        ("meta-llama/Llama-3.3-70B-Instruct", 2),
        ("meta-llama/Llama-3.3-70B-Instruct", 4),
    )
    for student, nodes in wanted:
        assert any(student in command and f"--nodes {nodes}" in command for command in with_arithmetic)
