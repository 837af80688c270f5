"""A sharded student answers the user's own questions, an uneven number of them; and training does not notice."""

import json

import pytest

from kd_plugin.evaluation import load_evaluation
from tests.zero.ranks import run_all


@pytest.mark.zero
def test_a_sharded_student_answers_an_uneven_number_of_questions(untied_student_dir, teacher_dir, tmp_path):
    rows = [{"prompt": f"{i} and {i}?", "answer": i % 2} for i in range(3)]  # one rank has two of them
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"rows": str(tmp_path / "own.jsonl"), "verify": "tests.hosts.test_eval_tasks:vowel", "max_new_tokens": 8}
    tasks = {"completions": 1, "tasks": {"own": own}}
    jobs = {}
    for name, more in (("without", {}), ("with", {"eval_tasks": tasks, "eval_strategy": "steps", "eval_steps": 1})):
        chosen = {"top_k": 1, "gradient_checkpointing": False, **more}
        if more:
            chosen["eval_tasks_batch_size"] = 1
        told = {"method": "panel", "stage": 3, "rows": 2, "teachers": {"t": teacher_dir}, "steps": 2}
        jobs[name] = {**told, "student": untied_student_dir, "output_dir": str(tmp_path / name), "arguments": chosen}
    found = run_all(jobs, tmp_path / "runs", timeout=900)
    for rank in (0, 1):
        assert found["with"][rank]["losses"] == found["without"][rank]["losses"]
    for step in (1, 2):
        result = load_evaluation(tmp_path / "with" / "evaluations" / f"step-{step}").results["own"]
        assert result.questions == 3 and 0 < result.tokens <= 8
