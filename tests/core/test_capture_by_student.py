"""A capture of a student's own rollouts: the student writes, the teacher scores, once."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin import TeacherCache
from kd_plugin.cache import Generation, TopK
from kd_plugin.capturing import capture
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.lineage.graph import Graph
from kd_plugin.teachers import LocalTeacher

PROMPTS = [{"prompt": f"{i} and {i}?"} for i in range(5)]
HOW = Generation(n=2, max_new_tokens=9, temperature=0.8, keep_unfinished=True)


def captured(directory, teacher_dir, student_dir, **more):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    return capture(PROMPTS, teacher, directory, targets=TopK(8), generate=HOW, by=student_dir, progress=False, **more)


def test_the_student_writes_and_the_teacher_scores(tmp_path, teacher_dir, student_dir):
    cache = captured(tmp_path / "own", teacher_dir, student_dir)
    alone = capture(
        PROMPTS, LocalTeacher(student_dir, dtype="float32"), tmp_path / "alone", targets=TopK(8), generate=HOW,
        progress=False,
    )  # fmt: skip
    rows, theirs = cache.dataset(), alone.dataset()
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in theirs] and len(rows) == 10
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    for row in rows:
        ids, mask = torch.tensor([row["input_ids"]]), np.array(row["completion_mask"], bool)
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        index = torch.tensor([i for i in cache.teacher_index(row["input_ids"]) if i >= 0])
        assert len(index) == mask.sum()
        wanted = logprobs[torch.from_numpy(np.flatnonzero(mask) - 1)].topk(8).values
        found = cache.signal(index).logprobs.sort(descending=True).values
        assert torch.allclose(found, wanted, atol=5e-3)  # stored in half precision


def test_the_student_is_in_the_lineage_and_in_the_settings(tmp_path, teacher_dir, student_dir, other_teacher_dir):
    cache = captured(tmp_path / "own", teacher_dir, student_dir)
    settings = cache.manifest.settings
    assert settings.written_by and "what the student generated" in settings.scored
    graph = Graph.from_json(cache.manifest.lineage)
    kinds = {edge.role: edge.kind for edge in graph.edges}
    assert kinds["student"] == "trained_on_outputs" and kinds["teacher"] == "distilled_logits"
    with pytest.raises(ConfigError, match="written_by"):
        captured(tmp_path / "own", teacher_dir, other_teacher_dir)


def test_it_needs_to_be_said_how(tmp_path, teacher_dir, student_dir):
    with pytest.raises(ConfigError, match="generate is not set"):
        capture(PROMPTS, LocalTeacher(teacher_dir), tmp_path, by=student_dir, progress=False)


def test_the_command(tmp_path, teacher_dir, student_dir):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    words = ["--dataset", str(tmp_path / "rows.jsonl"), "--teacher", teacher_dir, "--output_dir", str(tmp_path / "c")]
    words += ["--generate", json.dumps({"by": student_dir}), "--max_new_tokens", "5", "--keep_unfinished", "true"]
    assert main(["capture", *words, "--dry-run"]) == 0
    assert main(["capture", *words]) == 0
    assert TeacherCache(tmp_path / "c").manifest.settings.written_by
    wrong = [json.dumps({"by": student_dir, "n": 2}) if "by" in word and "{" in word else word for word in words]
    assert main(["capture", *wrong]) == 2
