"""The user's own set in the loop: what is measured and kept, and that training does not notice."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import trl
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.evaluation import EvaluationSettings, evaluate, load_evaluation
from kd_plugin.evaluation.page import write_page
from kd_plugin.evaluation.results import shares_of
from kd_plugin.lineage.record import load_record
from kd_plugin.teachers import LocalTeacher
from kd_plugin.text import LocalWriter
from kd_plugin.transformers import OfflineKDMixin, PanelSettings, TaskEvaluationMixin, TeacherPanelMixin
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import ROWS, launched, prompts, settings, weights
from tests.tiny import byte_tokenizer

QUESTIONS = 7  # no multiple of two ranks


def vowel(response, row):
    """A verifier of the user's own that draws random numbers, as a careless one may."""
    random.random(), np.random.random(), torch.rand(1)
    return len(response) % 2 == row["answer"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"prompt": f"{i} and {i}?", "answer": i % 2} for i in range(QUESTIONS)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"rows": str(folder / "own.jsonl"), "verify": "tests.hosts.test_eval_tasks:vowel", "max_new_tokens": 12}
    return {"completions": 2, "tasks": {"own": own}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    return capture(ROWS, teacher, tmp_path_factory.mktemp("c") / "cache", targets=TopK(32), progress=False)


def with_dropout(student_dir):
    model = AutoModelForCausalLM.from_pretrained(student_dir, attention_dropout=0.2, attn_implementation="eager")
    assert model.config.attention_dropout == 0.2
    return model


def offline(directory, student_dir, cache, eval_dataset=None, callbacks=None, **kwargs):
    return OfflineKDTrainer(
        model=with_dropout(student_dir),
        args=OfflineKDConfig(**settings(directory, **kwargs)),
        train_dataset=ROWS,
        eval_dataset=eval_dataset,
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
    )


def panel(directory, student_dir, teacher_dir, eval_dataset=None, **kwargs):
    return TeacherPanelTrainer(
        model=with_dropout(student_dir),
        teacher_model=teacher_dir,
        args=TeacherPanelConfig(**settings(directory, max_completion_length=6, **kwargs)),
        train_dataset=prompts(),
        eval_dataset=eval_dataset,
        processing_class=byte_tokenizer(),
    )


def plain_offline(directory, student_dir, cache, eval_tasks=None, **kwargs):
    cls = type("Offline", (OfflineKDMixin, Trainer), {})
    from tests.transformers.help import tokenized

    return cls(
        model=with_dropout(student_dir),
        args=TrainingArguments(**settings(directory, **kwargs)),
        teacher_cache=cache,
        train_dataset=tokenized([dict(row) for row in ROWS]),
        evaluation=EvaluationSettings(eval_tasks=eval_tasks),
        processing_class=byte_tokenizer(),
    )


def plain_panel(directory, student_dir, teacher_dir, eval_tasks=None, **kwargs):
    cls = type("Panel", (TeacherPanelMixin, Trainer), {})
    return cls(
        model=with_dropout(student_dir),
        args=TrainingArguments(**settings(directory, **kwargs)),
        teacher_models={"a": teacher_dir},
        panel_settings=PanelSettings(max_completion_length=6),
        evaluation=EvaluationSettings(eval_tasks=eval_tasks),
        train_dataset=prompts(),
        processing_class=byte_tokenizer(),
    )


def not_distilled(directory, student_dir, cache, eval_tasks=None, **kwargs):
    cls = type("Evaluated", (TaskEvaluationMixin, Trainer), {})
    from tests.transformers.help import tokenized

    return cls(
        model=with_dropout(student_dir),
        args=TrainingArguments(**settings(directory, **kwargs)),
        train_dataset=tokenized([dict(row) for row in ROWS]),
        evaluation=EvaluationSettings(eval_tasks=eval_tasks),
        processing_class=byte_tokenizer(),
        data_collator=DataCollatorForSeq2Seq(byte_tokenizer()),
    )


IN_LOOP = {"eval_strategy": "steps", "eval_steps": 1}


HOSTS = (offline, panel, plain_offline, plain_panel, not_distilled)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_training_does_not_notice(host, tasks, tmp_path, student_dir, teacher_dir, cache):
    """Dropout is on, batches are shuffled, the panel's student samples; and the weights are equal to the last bit."""
    found = []
    source = teacher_dir if "panel" in host.__name__ else cache
    for name, more in (("without", {}), ("with", {"eval_tasks": tasks, **IN_LOOP})):
        trainer = host(tmp_path / name, student_dir, source, **more)
        trainer.train()
        found.append(weights(trainer))
    measured = [entry for entry in trainer.state.log_history if "eval_own_accuracy" in entry]
    assert [entry["step"] for entry in measured] == [1, 2, 3, 4, 5]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    start = AutoModelForCausalLM.from_pretrained(student_dir).state_dict()
    assert any(not torch.equal(found[0][name], start[name]) for name in found[0] if name in start)


def test_beside_a_dataset_training_does_not_notice_either(tasks, tmp_path, student_dir, cache):
    """An evaluation of rows draws a random number itself (torch 2.13's loader); the tasks add nothing to that."""
    found = []
    for name, more in (("without", {}), ("with", {"eval_tasks": tasks})):
        trainer = offline(tmp_path / name, student_dir, cache, ROWS.select(range(4)), **IN_LOOP, **more)
        trainer.train()
        found.append(weights(trainer))
    logged = [entry for entry in trainer.state.log_history if "eval_own_accuracy" in entry]
    assert len(logged) == 5 and all("eval_loss" in entry for entry in logged)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_several_datasets_and_tasks_are_one_evaluation(tasks, tmp_path, student_dir, cache):
    rows = {"a": ROWS.select(range(4)), "b": ROWS.select(range(4, 8))}
    found = offline(tmp_path, student_dir, cache, rows, eval_tasks=tasks).evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_own_accuracy", "eval_own_accuracy_error"} <= set(found)


def test_it_measures_what_the_command_measures_of_the_checkpoint(tasks, tmp_path, student_dir, cache):
    """Answer by answer; and both leave the same files, which the page and a comparison read."""
    trainer = offline(tmp_path / "run", student_dir, cache, eval_tasks=tasks, save_strategy="steps", save_steps=5)
    trainer.train()
    logged = trainer.evaluate()
    kept = load_evaluation(tmp_path / "run" / "evaluations" / "step-5")
    model = LocalWriter(str(tmp_path / "run" / "checkpoint-5"), dtype="float32", license="mit")
    apart = evaluate(model, tasks, tmp_path / "apart", progress=False)
    assert kept.results["own"] == apart.results["own"]
    assert shares_of(kept.path / "own") == shares_of(apart.path / "own")
    assert logged["eval_own_accuracy"] == kept.results["own"].accuracy.value
    assert logged["eval_own_accuracy_error"] == kept.results["own"].accuracy.error
    assert "7 x 2" in write_page(kept).read_text()


@pytest.mark.parametrize("variant", ["padded", "untied", "softcapped"])
def test_questions_of_several_turns_by_a_real_template(variant, tmp_path, variant_dir, cache):
    """In the loop and by the command questions and answers are those of Qwen3's template."""
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nit is 2"},
    ]
    rows = [{"messages": [*turns, {"role": "user", "content": f"and {i}?"}], "answer": i % 2} for i in range(QUESTIONS)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"rows": str(tmp_path / "own.jsonl"), "verify": "tests.hosts.test_eval_tasks:vowel", "max_new_tokens": 12}
    tasks = {"completions": 2, "tasks": {"own": own}}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    trainer = OfflineKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(variant_dir(variant), attn_implementation="eager"),
        args=OfflineKDConfig(**settings(tmp_path / "run", eval_tasks=tasks, save_strategy="steps", save_steps=5)),
        train_dataset=ROWS,
        teacher_cache=cache,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    model = LocalWriter(str(tmp_path / "run" / "checkpoint-5"), dtype="float32", license="mit")
    apart = evaluate(model, tasks, tmp_path / "apart", progress=False).path
    kept = tmp_path / "run" / "evaluations" / "step-5"
    found, expected = (pq.read_table(place / "own" / "responses.parquet").to_pylist() for place in (kept, apart))
    assert [one["response"] for one in found] == [one["response"] for one in expected]
    assert len(found) == 2 * QUESTIONS and len({one["response"] for one in found}) > 2
    assert [one["prompt"] for one in found] == [one["prompt"] for one in expected]


def scripted(monkeypatch, *shares):
    """Have evaluations find these accuracies, one after the other."""
    from kd_plugin.evaluation import in_loop

    inner, left = in_loop.result_of, list(shares)

    def result(name, table, asked):
        right = round(left.pop(0) * len(table))
        passed = [i < right for i in range(len(table))]
        return inner(name, table.drop(["passed"]).append_column("passed", [passed]), asked)

    monkeypatch.setattr(in_loop, "result_of", result)


def test_the_best_checkpoint_and_the_stop_go_by_it_and_lineage_and_card_tell(
    tasks, tmp_path, student_dir, cache, monkeypatch
):
    scripted(monkeypatch, 0.0, 1.0, 0.5, 0.5, 0.5)
    trainer = offline(
        tmp_path, student_dir, cache, eval_tasks=tasks, **IN_LOOP, max_steps=20, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="own_accuracy",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 4 and Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    for place, value in (("checkpoint-1", 0.0), ("checkpoint-2", 1.0), ("checkpoint-3", 0.5), (".", 1.0)):
        record = load_record(tmp_path / place)
        share = record["evaluation"]["own"]["pass@1"]
        assert share["value"] == value and share["questions"] == QUESTIONS, place
        assert record["evaluation"]["own"]["asked"]["questions"].startswith(("sha256", "")) and record["digest"]
        front = front_of(tmp_path / place)
        assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == value
    assert load_record(tmp_path)["checkpoint"]["step"] == 2  # its weights are those
    assert main(["lineage", "verify", str(tmp_path / "checkpoint-2")]) == 0


def front_of(directory):
    import yaml

    return yaml.safe_load((directory / "README.md").read_text().split("---")[1])


def test_a_model_index_of_the_users_own_stays(tasks, tmp_path, student_dir, cache):
    trainer = offline(tmp_path, student_dir, cache, eval_tasks=tasks)
    own = (
        "---\nmodel-index:\n- name: mine\n  results:\n  - task: {type: x}\n    metrics: [{type: bleu, value: 3}]\n---\n"
    )
    trainer.train()
    for _ in range(2):  # the second time ours is there already
        trainer.evaluate()
        (tmp_path / "README.md").write_text(own) if not (tmp_path / "README.md").exists() else None
        trainer.save_model()
    index = front_of(tmp_path)["model-index"]
    assert index[0]["name"] == "mine" and len(index) == 2
    assert index[0]["results"][0]["metrics"][0]["value"] == 3


def test_two_ranks_measure_what_one_does(tasks, tmp_path, student_dir, cache):
    expected = offline(tmp_path / "one", student_dir, cache.path, eval_tasks=tasks).evaluate()
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    launched("tests.hosts.eval_tasks_worker", 2, (tmp_path, student_dir, cache.path))
    found = json.loads((tmp_path / "report.json").read_text())
    places = [tmp_path / name / "evaluations" / "step-0" / "own" for name in ("one", "run")]
    assert shares_of(places[0]) == shares_of(places[1]) and len(shares_of(places[1])) == QUESTIONS
    for name in ("eval_own_accuracy", "eval_own_accuracy_error"):
        assert found[name] == expected[name]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"eval_tasks": {"tasks": {"own": {"rows": "x.jsonl", "verfy": "exact"}}}}, "Did you mean .verify"),
        ({"eval_tasks": {"tasks": {}}}, "expected `tasks`"),
        ({"eval_tasks": "x.yaml", "eval_tasks_batch_size": 0}, "eval_tasks_batch_size is 0"),
    ],
)
def test_wrong_tasks_are_refused_before_a_student_is_loaded(given, words, tmp_path, cache):
    with pytest.raises(ConfigError, match=words):
        OfflineKDTrainer(model="nowhere", args=OfflineKDConfig(**settings(tmp_path, **given)), teacher_cache=cache)


def test_the_command_takes_them(tasks, tmp_path, student_dir, cache):
    import yaml

    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    config = settings(tmp_path / "out", max_steps=2, eval_tasks=str(tmp_path / "tasks.yaml"), **IN_LOOP)
    config |= {"model_name_or_path": student_dir, "teacher_cache": str(cache.path)}
    (tmp_path / "offline.yaml").write_text(yaml.safe_dump(config))
    assert main(["offline", "--config", str(tmp_path / "offline.yaml")]) == 0
    assert load_record(tmp_path / "out")["evaluation"]["own"]["answers"] == 2
