"""Every way to combine: one teacher is the single-teacher loss, a sum is the sum of runs, and order means nothing."""

import pytest
import torch

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits, from_logprobs
from kd_plugin.panel import OwnTerms, TeacherPanel
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.core.panel_help import START, assert_same_gradients, corrected, rows
from tests.hosts.runs import assert_same, losses, prompts, settings, weights
from tests.tiny import VARIANTS, tiny_llama, tiny_model

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "skew_kl"]
COMBINES = ["route", "weighted_kl", "mixture", "confidence"]


@pytest.fixture(scope="module")
def teachers(teacher_dir, other_teacher_dir):
    return {
        "a": LocalTeacher(teacher_dir, dtype="float32"),
        "b": LocalTeacher(other_teacher_dir, dtype="float32"),
        "c": LocalTeacher(tiny_llama(seed=9), tokenizer=object()),
    }


@pytest.fixture(scope="module", autouse=True)
def c_speaks_as_the_others(teachers):
    teachers["c"].assume_vocabulary(teachers["a"].vocabulary)


@pytest.fixture
def student():
    return tiny_llama(seed=1).train()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("combine", COMBINES)
def test_all_weight_on_one_teacher(combine, divergence, teachers, student):
    options = {} if combine == "route" else {"weights": {"b": 2.0}}
    panel = TeacherPanel(teachers, combine=combine, **options)
    row = {"teacher_id": "b"} if combine == "route" else {}
    mine = corrected(panel, student, [row] * 4, rows(), divergence=divergence)
    alone = corrected(TeacherPanel({"b": teachers["b"]}), student, [{}] * 4, rows(), divergence=divergence)
    torch.testing.assert_close(mine[0].loss_sum, alone[0].loss_sum)
    assert_same_gradients(mine[1], alone[1])


@pytest.mark.parametrize("combine", ["weighted_kl", "mixture", "confidence"])
def test_all_weight_on_one_teacher_in_a_whole_run(combine, tmp_path, student_dir, teacher_dir, other_teacher_dir):
    def run(name, models, **options):
        args = TeacherPanelConfig(**settings(tmp_path / name, max_completion_length=8, max_steps=3, **options))
        trainer = TeacherPanelTrainer(model=student_dir, teacher_models=models, args=args, train_dataset=prompts())
        trainer.train()
        return trainer

    both = {"a": teacher_dir, "b": other_teacher_dir}
    mine = run("mine", both, combine=combine, teacher_weights={"b": 1.0})
    alone = run("alone", {"b": other_teacher_dir})
    assert losses(mine) == pytest.approx(losses(alone), rel=1e-4)
    assert_same(weights(mine), weights(alone))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weighted_kl_is_the_sum_of_separate_losses(divergence, teachers, student):
    share = {"a": 0.5, "b": 0.3, "c": 0.2}
    mine = corrected(TeacherPanel(teachers, combine="weighted_kl", weights=share), student, [{}] * 4, rows(),
                     divergence=divergence)  # fmt: skip
    alone = {
        name: corrected(TeacherPanel({name: teacher}), student, [{}] * 4, rows(), divergence=divergence)
        for name, teacher in teachers.items()
    }
    torch.testing.assert_close(mine[0].loss_sum, sum(share[n] * loss.loss_sum for n, (loss, _) in alone.items()))
    summed = [sum(share[n] * g[i] for n, (_, g) in alone.items()) for i in range(len(mine[1]))]
    assert_same_gradients(mine[1], summed)


def test_teachers_with_their_own_divergence_and_temperature_are_the_sum_of_such_runs(teachers, student):
    own = {"a": OwnTerms(Divergence("forward_kl")), "b": OwnTerms(temperature=2.0)}
    mine = corrected(TeacherPanel(teachers, combine="weighted_kl", own=own), student, [{}] * 4, rows())
    parts = [
        corrected(TeacherPanel({"a": teachers["a"]}), student, [{}] * 4, rows(), divergence="forward_kl"),
        corrected(TeacherPanel({"b": teachers["b"]}), student, [{}] * 4, rows(), temperature=2.0),
        corrected(TeacherPanel({"c": teachers["c"]}), student, [{}] * 4, rows()),
    ]
    torch.testing.assert_close(mine[0].loss_sum, sum(loss.loss_sum for loss, _ in parts) / 3)
    assert_same_gradients(mine[1], [sum(g) / 3 for g in zip(*(g for _, g in parts), strict=True)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("combine", ["mixture", "confidence"])
def test_the_oracle_from_full_logits(combine, divergence, teachers, student):
    """Weights differ from row to row: by row, by domain and by teacher."""
    panel = TeacherPanel(
        teachers,
        combine=combine,
        weights={"a": 1, "b": 2, "c": 3},
        domain_weights={"d": {"a": 1.0, "c": 1.0}},
        confidence_temperature=0.5,
    )
    given = [{}, {"domain": "d"}, {"teacher_id": ["c", "a"], "teacher_weights": [1.0, 3.0]}, {"teacher_id": ["b"]}]
    share = [(1 / 6, 2 / 6, 3 / 6), (0.5, 0.0, 0.5), (0.75, 0.0, 0.25), (0.0, 1.0, 0.0)]
    loss, gradient = corrected(panel, student, given, rows(), divergence=divergence)
    ids, mask, positions = rows()

    def logits(model):
        return model(input_ids=ids, attention_mask=mask).logits[:, START - 1 : -1]

    said = [logits(teacher.model).detach() for teacher in teachers.values()]
    own, total = logits(student), 0.0
    for row, used in enumerate(positions):
        z = own[row, list(used)]
        judged = [(w, t[row, list(used)]) for w, t in zip(share[row], said, strict=True) if w > 0]
        if combine == "mixture":
            mixed = sum(w * t.softmax(-1) for w, t in judged).log()
            total = total + from_logprobs(z.log_softmax(-1), mixed, Divergence(divergence)).sum()
        else:
            entropy = torch.stack([-(t.softmax(-1) * t.log_softmax(-1)).sum(-1) for _, t in judged])
            base = torch.tensor([w for w, _ in judged]).log()[:, None]
            chosen = (base - entropy / 0.5).softmax(0)
            values = torch.stack([divergence_from_logits(z, t, Divergence(divergence)) for _, t in judged])
            total = total + (chosen * values).sum()
    torch.testing.assert_close(loss.loss_sum, total, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(total, [p for p in student.parameters() if p.requires_grad])
    assert_same_gradients(gradient, expected, 1e-4)


# `wide_tokenizer` has no loss: its vocabulary has a token that its head has not
@pytest.mark.parametrize("combine", ["weighted_kl", "mixture"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "wide_tokenizer"])
def test_full_logits_of_other_kinds_of_models(variant, combine, teachers):
    """A student and a teacher of one kind, and a tied teacher beside; each model's own forward pass is the oracle."""
    student = tiny_model(variant, seed=1).train()
    same = LocalTeacher(tiny_model(variant, seed=4, hidden=48), tokenizer=object())
    same.assume_vocabulary(teachers["a"].vocabulary)
    panel = TeacherPanel({"same": same, "tied": teachers["a"]}, combine=combine, weights={"same": 3, "tied": 1})
    loss, gradient = corrected(panel, student, [{}] * 4, rows(), divergence="jsd")
    ids, mask, positions = rows()

    def logits(model):
        found = model(input_ids=ids, attention_mask=mask).logits[:, START - 1 : -1, :259]
        return torch.cat([found[row, list(used)] for row, used in enumerate(positions)])

    own, said = logits(student), [logits(same.model).detach(), logits(teachers["a"].model).detach()]
    if combine == "mixture":
        mixed = (0.75 * said[0].softmax(-1) + 0.25 * said[1].softmax(-1)).log()
        total = from_logprobs(own.log_softmax(-1), mixed, Divergence("jsd")).sum()
    else:
        each = [divergence_from_logits(own, teacher, Divergence("jsd")).sum() for teacher in said]
        total = 0.75 * each[0] + 0.25 * each[1]
    torch.testing.assert_close(loss.loss_sum, total, rtol=1e-4, atol=1e-4)
    parameters = [p for p in student.parameters() if p.requires_grad]
    assert_same_gradients(gradient, torch.autograd.grad(total, parameters, allow_unused=True), 1e-4)


@pytest.mark.parametrize("order", [[3, 1, 0, 2], [2, 3, 1, 0]])
def test_route_in_any_order_gives_the_same_gradient(order, teachers, student):
    given = [{"teacher_id": name} for name in ("a", "b", "a", "c")]
    panel = TeacherPanel(teachers)
    mine = corrected(panel, student, given, rows(), order=order)
    theirs = corrected(panel, student, given, rows())
    torch.testing.assert_close(mine[0].loss_sum, theirs[0].loss_sum)
    assert_same_gradients(mine[1], theirs[1])


def test_a_schedule_is_read_at_the_step(teachers, student):
    moving = TeacherPanel(
        teachers, combine="weighted_kl", weights={"a": {"start": 1.0, "end": 0.0, "steps": 10}, "b": 1}
    )
    fixed = TeacherPanel(teachers, combine="weighted_kl", weights={"a": 0.4, "b": 1.0})
    mine = corrected(moving, student, [{}] * 4, rows(), step=6)
    theirs = corrected(fixed, student, [{}] * 4, rows())
    torch.testing.assert_close(mine[0].loss_sum, theirs[0].loss_sum)


def test_values_at_logging_steps_only_trains_the_same(tmp_path, student_dir, teacher_dir):
    """Three teachers over one head: the weights are those of a run that computes every value."""

    def run(name, **options):
        base = LocalTeacher(teacher_dir, dtype="float32").model
        models = {"a": base, "b": base, "c": base}
        args = TeacherPanelConfig(
            **settings(tmp_path / name, max_completion_length=8, combine="weighted_kl", divergence="reverse_kl",
                       logging_steps=2, max_steps=4, **options)
        )  # fmt: skip
        trainer = TeacherPanelTrainer(model=student_dir, teacher_models=models, args=args, train_dataset=prompts())
        trainer.train()
        return trainer

    always, logging = run("always"), run("logging", panel_values="logging")
    assert_same(weights(logging), weights(always))
    history = [e for e in logging.state.log_history if "loss" in e]
    assert [e["step"] for e in history] == [2, 4]
    for entry in history:  # the logged loss is that of the logging step: the mean of its teachers' divergences
        assert entry["loss"] == pytest.approx(sum(entry[f"divergence/{n}"] for n in "abc") / 3, rel=1e-4)
