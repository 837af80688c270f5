"""The panel on a plain ``transformers.Trainer``: what TRL's ``DistillationTrainer`` and plain PyTorch compute.

Tolerance as in tests/equivalence for TRL: 1e-4 relative in float32.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kd_plugin import LocalTeacher, capture
from kd_plugin.cache import TopK
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.errors import ConfigError, DataError, LicenseRefusedError
from kd_plugin.lineage import load_record
from kd_plugin.lineage.trainer_callback import lineage_callback
from kd_plugin.transformers import PanelSettings, TeacherPanelMixin
from kd_plugin.trl.upstream import HAS_PANEL
from tests.hosts.runs import Trace, assert_same, launched, losses, prompts, settings, weights
from tests.tiny import byte_tokenizer, save_tiny

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
ROUTES = ["a", "b", "b", "a", "b", "b", "b", "a"]
COMPLETIONS = [f" {'ab' * (i * 7 % 11)}c" for i in range(8)]


class Plain(Trainer):
    """What a project's own trainer is."""

    def create_optimizer(self, *args, **kwargs):
        self.asked_for_an_optimizer = True
        return super().create_optimizer(*args, **kwargs)


class PanelTrainer(TeacherPanelMixin, Plain):
    pass


def build(directory, student, teachers, rows=None, callbacks=None, eval_dataset=None, lineage=None, **kwargs):
    """Build a trainer; what `PanelSettings` has of ``kwargs`` goes there, the rest are its ``TrainingArguments``."""
    own = {name: kwargs.pop(name) for name in vars(PanelSettings()) if name in kwargs}
    own = {"max_completion_length": 12, **own}
    chosen = {"per_device_train_batch_size": 8, **kwargs}
    return PanelTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=TrainingArguments(**settings(directory, **chosen)),
        teacher_models=teachers,
        panel_settings=PanelSettings(**own),
        train_dataset=prompts(count=8) if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
        lineage=lineage,
    )


def test_the_lineages_hash_holds_the_panels_settings(tmp_path, student_dir, teacher_dir):
    kinds = ({}, {}, {"divergence": "forward_kl"}, {"max_completion_length": 5})
    built = [build(tmp_path / f"{i}", student_dir, {"t": teacher_dir}, **kind) for i, kind in enumerate(kinds)]
    first, again, *others = [lineage_callback(one.callback_handler.callbacks).run.config_hash for one in built]
    assert first == again and len({first, *others}) == 3


def run(*args, **kwargs):
    trace = Trace()
    trainer = build(*args, callbacks=[trace], **kwargs)
    trainer.train()
    return trainer, trace


def test_one_teacher_is_trls_distillation_trainer(tmp_path, student_dir, teacher_dir):
    """Each step takes all rows, for the two trainers shuffle otherwise, and generates greedily."""
    trace = Trace()
    trl = pytest.importorskip("trl", minversion="1.15")
    reference = trl.DistillationTrainer(
        model=student_dir,
        teacher_model=teacher_dir,
        args=trl.DistillationConfig(
            **settings(
                tmp_path / "trl", per_device_train_batch_size=8, max_completion_length=12, generation_kwargs=GREEDY,
                gradient_checkpointing=False,
            )
        ),
        train_dataset=prompts(count=8),
        callbacks=[trace],
    )  # fmt: skip
    reference.train()
    for accumulation in (1, 4):
        trainer, mine = run(
            tmp_path / str(accumulation), student_dir, {"teacher": teacher_dir}, generation_kwargs=GREEDY,
            gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation,
        )  # fmt: skip
        assert trainer.asked_for_an_optimizer
        assert losses(trainer) == pytest.approx(losses(reference), rel=1e-4)
        for gradients, expected in zip(mine.gradients, trace.gradients, strict=True):
            assert_same(gradients, expected)
        assert_same(weights(trainer), weights(reference))


def test_a_routed_panel_is_plain_pytorch(tmp_path, student_dir, teacher_dir, other_teacher_dir):
    teachers = {"a": teacher_dir, "b": other_teacher_dir}
    given = prompts(count=8, teacher_id=ROUTES, completion=COMPLETIONS)
    chosen = {"on_policy_fraction": 0.0, "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0}
    trainer, trace = run(tmp_path / "whole", student_dir, teachers, given, **chosen)
    student = AutoModelForCausalLM.from_pretrained(student_dir)
    models = {name: LocalTeacher(path, dtype="float32").model for name, path in teachers.items()}
    tokenizer, total, count = byte_tokenizer(), 0.0, 0
    for row in given:
        start = tokenizer(row["prompt"])["input_ids"]
        response = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"][:12]
        ids, scored = torch.tensor([start + response]), slice(len(start) - 1, -1)
        with torch.no_grad():
            p = models[row["teacher_id"]](ids).logits[0, scored]
        total = total + divergence_from_logits(student(ids).logits[0, scored], p, Divergence("reverse_kl")).sum()
        count += len(response)
    (total / count).backward()
    assert losses(trainer) == [pytest.approx((total / count).item(), rel=1e-4)]
    assert_same(trace.gradients[0], {name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    parts, part_trace = run(
        tmp_path / "parts", student_dir, teachers, given, gradient_accumulation_steps=4, per_device_train_batch_size=2,
        **chosen,
    )  # fmt: skip
    assert losses(parts) == pytest.approx(losses(trainer), rel=1e-5)
    assert_same(part_trace.gradients[0], trace.gradients[0], 1e-5)


def test_the_warm_up_is_that_of_trls_host(tmp_path, student_dir, teacher_dir):
    rows = [{"prompt": p, "completion": " and so on"} for p in prompts(count=16)["prompt"]]
    capture(rows, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(16), progress=False)
    if not HAS_PANEL:
        pytest.skip("TRL's host of the panel needs another TRL")
    from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer

    warm = {"warmup_cache": str(tmp_path / "cache"), "warmup_cache_steps": 3, "max_steps": 4}
    warm |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    mine, _ = run(tmp_path / "plain", student_dir, {"t": teacher_dir}, **warm)
    theirs = TeacherPanelTrainer(
        model=student_dir,
        teacher_models={"t": teacher_dir},
        args=TeacherPanelConfig(**settings(tmp_path / "trl", max_completion_length=12, **warm)),
        train_dataset=prompts(count=8),
    )
    theirs.train()
    assert len(losses(mine)) == 4
    assert losses(mine)[:3] == pytest.approx(losses(theirs)[:3], rel=1e-5)


def test_a_resumed_run_is_the_undisturbed_one_and_keeps_its_panel(
    tmp_path, student_dir, teacher_dir, other_teacher_dir
):
    chosen = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "length_alarm": 5.0, "alarm_window": 1}
    chosen |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, _ = run(tmp_path / "out", student_dir, {"t": teacher_dir}, **chosen)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / "panel.json").read_text())["teachers"].keys() == {"t"}
    assert (checkpoint / "alarm.json").is_file()
    assert load_record(checkpoint)["run"]["method"] == "teacher_panel"
    resumed = build(tmp_path / "out", student_dir, {"t": teacher_dir}, **chosen)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert_same(weights(resumed), weights(whole), 1e-7)
    other = build(tmp_path / "out", student_dir, {"t": other_teacher_dir}, **chosen)
    with pytest.raises(ConfigError, match="trained under another panel"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_two_ranks_take_the_steps_of_one(tmp_path, student_dir, teacher_dir, other_teacher_dir):
    found = []
    for ranks, rows in ((1, 8), (2, 4)):
        out = tmp_path / str(ranks)
        out.mkdir()
        job = (out, student_dir, teacher_dir, other_teacher_dir, rows)
        launched("tests.transformers.panel_worker", ranks, job)
        found.append(torch.load(out / "result.pt"))
    one, two = found
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and len(one["losses"]) == 3
    assert_same(two["weights"], one["weights"], 1e-4)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-4)


def test_an_evaluation_is_a_mean_over_tokens_and_always_the_same(tmp_path, student_dir, teacher_dir):
    held_out = prompts(count=7)
    found = []
    for rows in (7, 2):
        trainer = build(
            tmp_path / str(rows), student_dir, {"t": teacher_dir}, eval_dataset=held_out, generation_kwargs=GREEDY,
            per_device_eval_batch_size=rows,
        )  # fmt: skip
        found += [trainer.evaluate(), trainer.evaluate()]
        assert {"eval_divergence/t", "eval_tokens/t", "eval_rollouts/repetition"} <= trainer.state.log_history[
            -1
        ].keys()
    assert [one["eval_loss"] for one in found] == pytest.approx([found[0]["eval_loss"]] * 4, rel=1e-5)
    assert found[0]["eval_loss"] > 0


def test_what_is_seen_and_kept_of_a_run(tmp_path, student_dir, teacher_dir):
    trainer, _ = run(tmp_path, student_dir, {"t": teacher_dir}, save_rollouts=2, max_steps=2, anchor_weight=0.1)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = {"divergence/t", "tokens/t", "divergence/start", "entropy/t", "time/t", "rollouts/truncated"}
    assert all(expected <= entry.keys() for entry in logged)
    assert logged[0]["divergence/start"] == pytest.approx(0.0, abs=1e-6)
    assert len(list((tmp_path / "rollouts").iterdir())) == 2


def test_what_cannot_be_is_refused(tmp_path, student_dir, teacher_dir):
    with pytest.raises(DataError, match="no column 'prompt'"):
        build(tmp_path, student_dir, {"t": teacher_dir}, prompts(count=8).rename_column("prompt", "text"))
    with pytest.raises(DataError, match="must say who scores it"):
        build(tmp_path, student_dir, {"a": teacher_dir, "b": teacher_dir})
    closed = save_tiny(tmp_path / "closed", license="cc-by-nc-4.0", seed=2, hidden=48)
    with pytest.raises(LicenseRefusedError):
        build(tmp_path, student_dir, {"t": closed}, lineage={"use": {"commercial": True}})
    with pytest.raises(ConfigError, match="leave data_collator out"):
        PanelTrainer(
            model=AutoModelForCausalLM.from_pretrained(student_dir),
            args=TrainingArguments(**settings(tmp_path)),
            teacher_models={"t": teacher_dir},
            data_collator=list,
        )
