"""One teacher and default settings: the panel's trainer is TRL's ``DistillationTrainer``.

Tolerance 1e-4 relative in float32: both sides sum the same terms over 259 tokens and 2 layers, in another order.
"""

import pytest
import torch
from trl import DistillationConfig, DistillationTrainer

from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import LORA, Trace, assert_same, losses, prompts, settings, weights


def train(trainer_class, config_class, directory, student, teacher, kind="plain", peft=None, **kwargs):
    trace = Trace()
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=config_class(**settings(directory, max_completion_length=12, **kwargs)),
        train_dataset=prompts(kind),
        peft_config=peft,
        callbacks=[trace],
    )
    trainer.train()
    return trainer, trace


def assert_same_runs(mine, theirs, steps=5):
    (trainer, trace), (reference, reference_trace) = mine, theirs
    assert losses(trainer) == pytest.approx(losses(reference), rel=1e-4)
    assert len(trace.gradients) == len(reference_trace.gradients) == steps
    for gradients, expected in zip(trace.gradients, reference_trace.gradients, strict=True):
        assert_same(gradients, expected)
    assert_same(weights(trainer), weights(reference))


@pytest.mark.parametrize("kind", ["plain", "conversational"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_default_settings_give_the_same_run(kind, accumulation, peft, tmp_path, student_dir, teacher_dir):
    common = {"student": student_dir, "teacher": teacher_dir, "kind": kind, "peft": peft}
    common |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    assert_same_runs(
        train(TeacherPanelTrainer, TeacherPanelConfig, tmp_path / "panel", **common),
        train(DistillationTrainer, DistillationConfig, tmp_path / "trl", **common),
    )


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_beta_keeps_trls_meaning(beta, tmp_path, student_dir, teacher_dir):
    common = {"student": student_dir, "teacher": teacher_dir, "beta": beta, "temperature": 0.9}
    assert_same_runs(
        train(TeacherPanelTrainer, TeacherPanelConfig, tmp_path / "panel", **common),
        train(DistillationTrainer, DistillationConfig, tmp_path / "trl", **common),
    )


# In TRL 1.16 rows beyond the tokenizer take part in the softmax, and of scales it reads Cohere's `logit_scale` alone:
# `padded` and `scaled` have their oracle in test_panel_modes
@pytest.mark.parametrize("variant", ["untied", "softcapped", "biased", "moe"])
def test_other_kinds_of_student_and_teacher_give_the_same_run(variant, tmp_path, variant_dir):
    common = {"student": variant_dir(variant), "teacher": variant_dir(variant, seed=2, hidden=48), "max_steps": 2}
    common |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "beta": 0.5}
    assert_same_runs(
        train(TeacherPanelTrainer, TeacherPanelConfig, tmp_path / "panel", **common),
        train(DistillationTrainer, DistillationConfig, tmp_path / "trl", **common),
        steps=2,
    )


def test_the_comparison_can_fail(tmp_path, student_dir, teacher_dir, other_teacher_dir):
    mine = train(TeacherPanelTrainer, TeacherPanelConfig, tmp_path / "a", student_dir, teacher_dir)
    other = train(TeacherPanelTrainer, TeacherPanelConfig, tmp_path / "b", student_dir, other_teacher_dir)
    with pytest.raises(AssertionError):
        assert_same_runs(mine, other)


def gradient_of(trainer, rows_at_once):
    """Return the gradient of one generation batch of 8 rows, split into micro-batches."""
    steps = 8 // rows_at_once
    trainer.args.per_device_train_batch_size = rows_at_once
    trainer.args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = steps
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._step, trainer._buffered_inputs = 0, None
    torch.manual_seed(5)
    batch = [dict(row) for row in trainer.train_dataset.select(range(8))]
    for _ in range(steps):
        trainer.training_step(trainer.model, batch, None)
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("combine", ["route", "weighted_kl"])
def test_micro_batches_give_one_gradient(combine, tmp_path, student_dir, teacher_dir, other_teacher_dir):
    ids = ["a", "b", "b", "a", "b", "b", "b", "a"] * 3
    trainer = TeacherPanelTrainer(
        model=student_dir,
        teacher_models={"a": teacher_dir, "b": other_teacher_dir},
        args=TeacherPanelConfig(
            **settings(tmp_path, combine=combine, max_completion_length=12, gradient_checkpointing=False)
        ),
        train_dataset=prompts(teacher_id=ids) if combine == "route" else prompts(),
    )
    trainer.create_optimizer_and_scheduler(5)
    whole = gradient_of(trainer, 8)
    assert_same(gradient_of(trainer, 2), whole, 1e-5)
    assert_same(gradient_of(trainer, 1), whole, 1e-5)
