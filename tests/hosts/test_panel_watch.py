"""Metrics, saved rollouts and guards in full runs of the panel's trainer."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.monitor.traces import read_rollouts
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import LORA, assert_same, losses, prompts, settings, weights
from tests.tiny import byte_tokenizer

END = 2  # <|im_end|>


def panel(directory, student, teachers, peft_config=None, rows=None, eval_dataset=None, **kwargs):
    return TeacherPanelTrainer(
        model=student,
        teacher_models=teachers,
        args=TeacherPanelConfig(**settings(directory, **{"max_completion_length": 12, **kwargs})),
        train_dataset=rows or prompts(domain=["sums", "words"] * 12),
        eval_dataset=eval_dataset,
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )


def with_ending(directory, to, bias, lift=0.0):
    """Save a copy of a tiny model that ends its text more or less often, by giving its head a direction of its own."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight.data = model.get_output_embeddings().weight.detach().clone() * 0.1
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)
    # A constant coordinate of the last hidden state, which the head reads for the end and one other token
    norm = model.base_model.norm
    norm.weight.data[0] = 0.0
    _constant_first_coordinate(model)
    head.weight.data[:, 0] = 0.0
    head.weight.data[END, 0] = bias
    head.weight.data[ord("a"), 0] = lift
    model.save_pretrained(to)
    byte_tokenizer().save_pretrained(to)
    (to / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return str(to)


def _constant_first_coordinate(model):
    """Make the first coordinate of every embedding large, so that it survives the layers as a constant."""
    model.get_input_embeddings().weight.data[:, 0] = 8.0
    model.base_model.norm.weight.data[0] = 1.0


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_what_is_logged_of_teachers_and_of_responses(tmp_path, student_dir, teacher_dir, other_teacher_dir):
    teachers = {"math": teacher_dir, "code": other_teacher_dir}
    trainer = panel(tmp_path, student_dir, teachers, combine="weighted_kl", max_steps=2, eval_dataset=prompts(count=4))
    trainer.train()
    found = trainer.evaluate()
    for entry, prefix in ((logged(trainer)[-1], ""), (found, "eval_")):
        for name in teachers:
            for metric in ("divergence", "tokens", "entropy", "agreement", "support_overlap", "time"):
                assert math.isfinite(entry[f"{prefix}{metric}/{name}"]), metric
        assert 0.0 <= entry[f"{prefix}disagreement/math|code"] <= 1.0
        assert 0.0 < entry[f"{prefix}jensen_shannon/math|code"] < math.log(2)
        assert 0.0 <= entry[f"{prefix}rollouts/repetition"] <= 1.0
        assert 0.0 <= entry[f"{prefix}completions/clipped_ratio"] <= 1.0


def test_watching_changes_nothing_that_is_learnt(tmp_path, student_dir, teacher_dir, other_teacher_dir):
    teachers = {"math": teacher_dir, "code": other_teacher_dir}
    runs = []
    for name, watch in (("off", {"watch_positions": 0}), ("on", {"save_rollouts": 3, "length_alarm": 2.0})):
        runs.append(panel(tmp_path / name, student_dir, teachers, combine="weighted_kl", max_steps=2, **watch))
        runs[-1].train()
    assert losses(runs[0]) == losses(runs[1])
    assert_same(weights(runs[0]), weights(runs[1]), relative=0.0)
    assert not any("entropy/" in key for key in logged(runs[0])[0])


def test_saved_rollouts_hold_what_the_loss_used_and_make_a_page(tmp_path, student_dir, teacher_dir, other_teacher_dir):
    rows = prompts(teacher_id=["math", "code"] * 12, domain=["sums", "words"] * 12)
    trainer = panel(
        tmp_path,
        student_dir,
        {"math": teacher_dir, "code": other_teacher_dir},
        rows=rows,
        max_steps=4,
        logging_steps=2,
        save_rollouts=64,
        gradient_accumulation_steps=2,
        divergence="reverse_kl",
    )
    trainer.train()
    files = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert files == ["step-00000002-rank-0.jsonl", "step-00000004-rank-0.jsonl"]
    found = read_rollouts(tmp_path)
    assert len(found) == 2 * 8  # every row of the logging steps
    assert {(r["domain"], *r["teachers"]) for r in found} == {("sums", "math"), ("words", "code")}
    last = [r for r in found if r["step"] == 4]
    total = sum(sum(r["correction"]) for r in last)
    count = sum(len(r["scored"]) for r in last)
    by_teacher = logged(trainer)[-1]
    named = sum(by_teacher[f"divergence/{n}"] * by_teacher[f"tokens/{n}"] for n in ("math", "code"))
    assert count <= by_teacher["tokens/math"] + by_teacher["tokens/code"]
    assert total / count == pytest.approx(named / (by_teacher["tokens/math"] + by_teacher["tokens/code"]), rel=0.2)
    for row in last:
        assert len(row["student"]) == len(row["scored"]) <= len(row["tokens"])
        (said,) = row["teachers"].values()
        for logprob, top in zip(said["logprob"], said["top"], strict=True):
            assert len(top) == 5 and math.exp(logprob) <= top[0][1] + 1e-3
    assert main(["trace", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert "sums" in (tmp_path / "page.html").read_text()


def test_truncated_completions_leave_the_loss_as_if_their_rows_were_not_there(tmp_path, student_dir, teacher_dir):
    trainer = panel(tmp_path, student_dir, {"t": teacher_dir}, max_steps=1, mask_truncated_completions=True)
    kept, seen = [], {}
    generate = trainer._generate_and_score_completions

    def spying(inputs):
        output = generate(inputs)
        seen["written"], seen["items"] = output["scored"].rollouts.responses, float(output["num_items_in_batch"])
        kept.extend(list(one.positions) for one in output["scored"].scores)
        return output

    trainer._generate_and_score_completions = spying
    trainer.train()
    assert any(one.truncated for one in seen["written"])
    for one, positions in zip(seen["written"], kept, strict=True):
        assert positions == ([] if one.truncated else list(range(len(one.tokens))))
        assert one.truncated == (one.tokens[-1] != END)
    assert seen["items"] == sum(map(len, kept))
    assert logged(trainer)[0]["rollouts/masked"] == pytest.approx(sum(o.truncated for o in seen["written"]) / 4)


def test_a_rollout_that_repeats_itself_is_stopped(tmp_path, student_dir, teacher_dir):
    looping = with_ending(student_dir, tmp_path / "loops", bias=-5.0, lift=5.0)
    written = []
    trainer = panel(
        tmp_path / "out", looping, {"t": teacher_dir}, max_steps=1, max_completion_length=200, repetition_stop=5
    )
    generated = []
    generate = trainer.model.generate
    trainer.model.generate = lambda *a, **k: generated.append(generate(*a, **k)) or generated[-1]
    score = trainer.panel_step.score
    trainer.panel_step.score = lambda assigned, rollouts, **rest: (
        written.extend(rollouts.responses) or score(assigned, rollouts, **rest)
    )
    trainer.train()
    assert max(len(one.tokens) for one in written) < 40
    assert max(ids.size(1) for ids in generated) < 200  # it was stopped while it wrote
    assert logged(trainer)[0]["rollouts/looping"] > 0.0


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_an_anchor_holds_the_student_near_its_start(peft, tmp_path, student_dir, teacher_dir):
    drift = {}
    for weight in (1e-6, 10.0):
        trainer = panel(
            tmp_path / str(weight),
            student_dir,
            {"t": teacher_dir},
            peft,
            max_steps=6,
            anchor_weight=weight,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
        )
        trainer.train()
        first, *_, drift[weight] = (entry["divergence/start"] for entry in logged(trainer))
        assert abs(first) < 1e-5  # it begins where it is held
    assert drift[10.0] < 0.3 * drift[1e-6]


def collapsing(tmp_path, student_dir, **kwargs):
    """Build a student that ends soon and learns from a teacher that never ends: its responses run into the limit."""
    student = with_ending(student_dir, tmp_path / "student", bias=1.0)
    teacher = with_ending(student_dir, tmp_path / "teacher", bias=-3.0)
    return panel(
        tmp_path / "out",
        student,
        {"t": teacher},
        max_steps=12,
        max_completion_length=32,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        length_alarm=1.5,
        alarm_window=3,
        divergence="reverse_kl",
        **kwargs,
    )


def test_a_collapse_is_caught_and_the_run_stops_with_what_it_learnt(tmp_path, student_dir):
    trainer = collapsing(tmp_path, student_dir, alarm_action="stop")
    trainer.train()
    steps = trainer.state.global_step
    assert 3 < steps < 12
    assert logged(trainer)[-1]["alarm"] == 1.0
    lengths = [entry["completions/mean_length"] for entry in logged(trainer)]
    assert sum(lengths[-3:]) > 1.5 * sum(lengths[:3])
    assert (tmp_path / "out" / f"checkpoint-{steps}" / "lineage.json").is_file()
    assert json.loads((tmp_path / "out" / f"checkpoint-{steps}" / "alarm.json").read_text())["quiet"] == 3


def test_a_collapse_lowers_the_learning_rate(tmp_path, student_dir):
    trainer = collapsing(tmp_path, student_dir, alarm_action="lower_learning_rate", alarm_factor=0.1)
    trainer.args.max_steps = 8
    trainer.train()
    rung = [i for i, entry in enumerate(logged(trainer)) if entry["alarm"]]
    assert rung
    rates = [entry["learning_rate"] for entry in logged(trainer)]
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-3 * 0.1 ** len(rung))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"repetition_stop": 1}, "from 2"),
        ({"anchor_weight": -1.0}, "at least 0"),
        ({"save_rollouts": -1}, "at least 0"),
        ({"save_rollouts_top_k": 0}, "at least 1"),
        ({"alarm_action": "stpo"}, "Did you mean 'stop'"),
        ({"length_alarm": 0.9}, "above 1"),
        ({"truncation_alarm": 2.0}, "between 0 and 1"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_before_anything_is_loaded(wrong, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        TeacherPanelConfig(**settings(tmp_path), **wrong)


def test_the_page_on_watching_names_fields_that_exist(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    fields = {key: value for block in blocks for key, value in yaml.safe_load(block).items()}
    config = TeacherPanelConfig(**settings(tmp_path), **fields)
    assert len(fields) >= 11 and config.alarm_settings().is_set
