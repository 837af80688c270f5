"""A student learns from completions that a teacher wrote, in process or on a server, without any other dataset."""

import math

import pytest

from kd_plugin import LocalTeacher, ServerTeacher
from kd_plugin.cache import Generation, TopK
from kd_plugin.capturing import capture
from kd_plugin.lineage import load_record
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.fake_vllm import fake_vllm
from tests.hosts.runs import losses, prompts, settings


@pytest.mark.parametrize("place", ["local", "server"])
def test_a_written_cache_trains_a_student(student_dir, teacher_dir, tokenizer, tmp_path, place):
    local = LocalTeacher(teacher_dir, dtype="float32")
    options = {
        "targets": TopK(32),
        "generate": Generation(n=2, max_new_tokens=10, keep_unfinished=True),
        "filter": lambda completion, row: len(completion) > 0 or "empty",
        "progress": False,
    }
    with fake_vllm(local.model, tokenizer) as (url, _):
        teacher = local if place == "local" else ServerTeacher(url, "tiny", repo=teacher_dir)
        cache = capture(prompts(count=12), teacher, tmp_path / "c", **options)
    arguments = OfflineKDConfig(**settings(tmp_path / "out", max_steps=3))
    trainer = OfflineKDTrainer(student_dir, arguments, processing_class=tokenizer, teacher_cache=cache)
    trainer.train()
    assert len(losses(trainer)) == 3 and all(math.isfinite(loss) and loss > 0 for loss in losses(trainer))
    trainer.save_model()
    nodes = load_record(tmp_path / "out")["nodes"]
    endpoints = [node["endpoint"] for node in nodes if node.get("endpoint")]
    assert endpoints == (["127.0.0.1"] if place == "server" else [])
