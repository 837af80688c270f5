"""A panel with teachers behind servers: it trains as the local one, and survives a server's death."""

import pytest
import torch

from kd_plugin.errors import DataError, ServerError
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


def test_interleaved_rollouts_keep_to_what_a_server_lists(local, tokenizer, tmp_path, student_dir, teacher_dir):
    with fake_vllm(local.model, tokenizer) as (url, _):
        short = ServerTeacher(url, tokenizer=tokenizer, top_k=2, repo=teacher_dir, license="apache-2.0")
        run = trainer(
            tmp_path, student_dir, short, estimator="topk_tail", rollouts="interleaved", max_completion_length=12
        )
        run.model.train()
        batch = run._generate_and_score_completions([dict(row) for row in run.train_dataset.select(range(4))])
    start = batch["prompt_ids"].shape[1]
    ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
    with torch.no_grad():
        best = local.model(input_ids=ids, attention_mask=mask).logits.topk(2).indices[:, start - 1 : -1]
    listed = (best == batch["completion_ids"].unsqueeze(-1)).any(-1)
    assert listed[batch["completion_mask"].bool()].all()
    assert run._metrics["train"]["rollouts/replaced"][-1] > 0


class FakeGeneration:
    """Answers as TRL's ``VLLMGeneration`` does; its tokens are drawn by a student that has moved on since."""

    def __init__(self, shift):
        self.shift, self.lost = shift, False

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        completions = [[10 + i, 20 + i, 30] for i in range(len(prompts))]
        logprobs = [[[-5.0 + self.shift]] * (2 if self.lost else 3) for _ in prompts]
        return prompts, completions, logprobs, [[[token] for token in row] for row in completions]


def test_importance_ratios_come_from_what_vllm_said(local, tmp_path, student_dir):
    """Tokens of which vLLM was far surer than the student is now count half as much: the ratio's lower bound."""

    def gradient(shift, lost=False):
        torch.manual_seed(0)
        made = trainer(tmp_path / f"{shift}{lost}", student_dir, local, estimator="sampled", ratio_bounds=[0.5, 2.0])
        made.use_vllm, made._last_loaded_step, made.vllm_generation = True, -1, FakeGeneration(shift)
        made.vllm_generation.lost = lost
        made.create_optimizer_and_scheduler(5)
        made.current_gradient_accumulation_steps = 1
        made.model.train()
        made.training_step(made.model, [dict(row) for row in made.train_dataset.select(range(4))], None)
        return {n: p.grad for n, p in made.model.named_parameters()}

    low, high = gradient(100.0), gradient(-100.0)
    assert_same({n: 4 * g for n, g in low.items()}, high)
    with pytest.raises(DataError, match=r"\[2, 2, 2, 2\] tokens of completions of \[3, 3, 3, 3\]"):
        gradient(0.0, lost=True)


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
