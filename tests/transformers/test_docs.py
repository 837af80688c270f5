"""The code of docs/transformers.md runs as typed, with tiny models in the place of the names."""

import re
from pathlib import Path

from kd_plugin.lineage import load_record
from tests.tiny import save_tiny

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("TEACHER", "STUDENT")):
        save_tiny(tmp_path / name, seed=seed, tied=False, scale=1.0)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(code.replace("output_dir=", "use_cpu=True, output_dir="), str(PAGE), "exec"), {})
    assert load_record(tmp_path / "out" / "checkpoint-2")["run"]["method"] == "offline_kd"
    assert load_record(tmp_path / "on-policy" / "checkpoint-2")["run"]["method"] == "teacher_panel"
