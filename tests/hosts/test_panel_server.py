"""A panel with teachers behind servers: it trains as the local one, and survives a server's death."""

import pytest

from kd_plugin.errors import ServerError
from kd_plugin.lineage import verify
from kd_plugin.teachers import LocalTeacher, ServerTeacher, client
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.fake_vllm import fake_vllm
from tests.hosts.runs import assert_same, losses, prompts, settings, weights


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def local(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


def trainer(directory, student, teacher, **options):
    common = {"max_completion_length": 6, "max_steps": 4, "student_top_k": 0, "top_k_tail": 32, **options}
    return TeacherPanelTrainer(
        model=student,
        teacher_models={"t": teacher},
        args=TeacherPanelConfig(**settings(directory, divergence="reverse_kl", **common)),
        train_dataset=prompts(),
    )


def server(url, tokenizer, teacher_dir, **options):
    return ServerTeacher(url, tokenizer=tokenizer, top_k=32, repo=teacher_dir, license="apache-2.0", **options)


@pytest.mark.parametrize("estimator", ["sampled", "topk_tail"])
def test_it_trains_as_the_local_teacher(estimator, local, tokenizer, tmp_path, student_dir, teacher_dir):
    with fake_vllm(local.model, tokenizer) as (url, _):
        mine = trainer(tmp_path / "a", student_dir, server(url, tokenizer, teacher_dir), estimator=estimator)
        mine.train()
    theirs = trainer(tmp_path / "b", student_dir, local, estimator=estimator)
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-3, abs=1e-3)
    assert_same(weights(mine), weights(theirs), 1e-3)


def test_a_server_that_dies_for_good(local, tokenizer, tmp_path, student_dir, teacher_dir):
    """What was learnt is saved, with its lineage, and the run goes on when the server is back."""
    with fake_vllm(local.model, tokenizer) as (url, behaviour):
        teacher = server(url, tokenizer, teacher_dir, max_retries=1)
        dying = trainer(tmp_path, student_dir, teacher, estimator="topk_tail")
        original = dying.training_step

        def die_after_two_steps(*args, **kwargs):
            if dying.state.global_step == 2:
                behaviour.failures[:] = [0] * 1000
            return original(*args, **kwargs)

        dying.training_step = die_after_two_steps
        with pytest.raises(ServerError):
            dying.train()
        assert verify(tmp_path / "checkpoint-2").exit_code == 0
        assert (tmp_path / "checkpoint-2" / "panel.json").is_file()
        behaviour.failures.clear()
        back = trainer(tmp_path, student_dir, server(url, tokenizer, teacher_dir), estimator="topk_tail")
        back.train(resume_from_checkpoint=True)
        assert back.state.global_step == 4
