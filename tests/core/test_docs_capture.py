"""The code of docs/capture.md runs as typed, with tiny models and a stand-in server in the place of the names."""

import re
from pathlib import Path

import pytest
import yaml

from kd_plugin import LocalTeacher, TeacherCache
from kd_plugin.cli.main import main
from tests.core.cache_help import prompt_rows
from tests.fake_vllm import fake_vllm
from tests.tiny import byte_tokenizer, save_tiny

PAGE = Path(__file__).parents[2] / "docs" / "capture.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "my_filters.py").write_text("def is_short(completion, row):\n    return len(completion) < 1000\n")
    trl = pytest.importorskip("trl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    save_tiny(tmp_path / "TEACHER", tied=False)
    tokenizer.save_pretrained(tmp_path / "TEACHER")
    tokenizer.save_pretrained(tmp_path / "STUDENT")
    teacher = LocalTeacher(str(tmp_path / "TEACHER"))
    rows = [{**row, "answer": "7"} for row in prompt_rows(6)]
    datasets.Dataset.from_list(rows).to_json("rows.jsonl")
    scope = {
        "dataset": rows,
        "prompts": [{"prompt": row["prompt"], "answer": "7"} for row in rows],
        "conversations": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        "datasets": datasets,
    }
    code = blocks("python")
    assert len(code) == 6
    with fake_vllm(teacher.model, byte_tokenizer()) as (url, behaviour):
        behaviour.name = "served-name"
        for block in code:
            # A random teacher's answers are never right
            block = block.replace("http://127.0.0.1:8000", url).replace('filter="math_verify"', "filter=is_kept")
            block = block.replace("max_new_tokens=512", "max_new_tokens=8, keep_unfinished=True")
            scope["is_kept"] = lambda completion, row: True
            exec(compile(block, str(PAGE), "exec"), scope)
        (config,) = blocks("yaml")
        (tmp_path / "capture.yaml").write_text(config.replace("http://127.0.0.1:8000", url))
        monkeypatch.setenv("TEACHER_KEY", "x")
        assert main(["capture", "--config", "capture.yaml", "--max_new_tokens=8"]) == 0
    assert set(yaml.safe_load(config)) >= {"filter", "teacher", "mode"}
    sizes = {
        name: len(TeacherCache(name))
        for name in ("scored", "written", "from-server", "streamed", "from-yaml", "turns", "shown")
    }
    assert sizes == {
        "scored": 6,
        "written": 24,
        "from-server": 6,
        "streamed": 6,
        "from-yaml": 12,
        "turns": 1,
        "shown": 6,
    }
