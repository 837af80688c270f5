"""The pages for those who come from another trainer: the new code runs, the old one names what is there."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from kd_plugin.cli.main import main
from kd_plugin.cli.training import parse
from kd_plugin.panel.block import panel_from
from kd_plugin.trl import TeacherPanelConfig
from tests.tiny import save_tiny

PAGES = Path(__file__).parents[2] / "docs" / "migrating"


def blocks(language):
    """Return all blocks of a language, with the page of each."""
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in sorted(PAGES.glob("*.md"))
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
    ]


def side(text, sign):
    """Return the code before (-) or after (+) the change."""
    return "\n".join(line[1:] for line in text.splitlines() if line[:1] in (sign, " ") or not line)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("TEACHER", "OTHER", "STUDENT")):
        # Untied: a random tied teacher predicts its own input, which is what a cache shifted by one looks like
        save_tiny(tmp_path / name, seed=seed, tied=False, scale=1.0)
    save_tiny(tmp_path / "OTHER_TOKENS", seed=4, swap=("a", "b"))
    question, answer = {"role": "user", "content": "7 times 8?"}, {"role": "assistant", "content": "56"}
    for name, row in (
        ("rows", {"prompt": "a?", "completion": " b"}),
        ("conversations", {"messages": [question, answer]}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    return tmp_path


@pytest.mark.parametrize("text", blocks("diff"))
def test_the_new_code_runs(text, place):
    code = side(text, "+").replace("output_dir=", "use_cpu=True, bf16=False, report_to='none', output_dir=")
    scope = {}
    exec(compile(code, "new", "exec"), scope)
    assert scope["trainer"].state.global_step == 2


@pytest.mark.parametrize("text", blocks("diff"))
def test_the_old_code_names_what_is_there(text):
    tree, names = ast.parse(side(text, "-")), {}
    for line in tree.body:
        if isinstance(line, ast.ImportFrom):
            module = importlib.import_module(line.module)
            names |= {one.name: getattr(module, one.name) for one in line.names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    configs = [call for call in calls if call.func.id.endswith("Config")]
    assert len(configs) == 1
    fields = names[configs[0].func.id].__dataclass_fields__
    assert [key.arg for key in configs[0].keywords if key.arg not in fields] == []


@pytest.mark.parametrize("text", blocks("bash"))
def test_the_commands_run(text, place, capsys):
    for line in text.splitlines():
        _, *words = line.split()
        if words[0] == "panel":
            continue  # needs the servers; its settings are read below
        if words[0] == "offline":
            words += ["--use_cpu", "--no_bf16", "--report_to", "none"]
        assert main(words) == 0, capsys.readouterr()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_settings_are_taken(text, place):
    (place / "panel.yaml").write_text(text)
    words = ["--config", "panel.yaml", "--use_cpu", "--model_name_or_path", "STUDENT", "--dataset_name", "rows.jsonl"]
    _, config, _ = parse("panel", TeacherPanelConfig, words)
    assert list(panel_from(None, None, config).teachers) == ["math", "code"] and config.rollout_engine is not None
