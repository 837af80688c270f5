"""The user's own set at validation: training does not notice, callbacks go by it, lineage tells."""

import json

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation import load_evaluation
from kd_plugin.lightning import KDDataModule, NoRows, OfflineKD, OfflineKDModule, TaskEvaluation, TeacherPanelModule
from kd_plugin.lineage.record import load_record
from tests.hosts.test_eval_tasks import scripted
from tests.lightning.help import ROWS, Plain, loader, trainer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"prompt": f"{i} and {i}?", "answer": i % 2} for i in range(5)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"rows": str(folder / "own.jsonl"), "verify": "tests.hosts.test_eval_tasks:vowel", "max_new_tokens": 12}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"completions": 2, "tasks": {"own": own}}))
    return str(folder / "tasks.yaml")


DROPOUT = {"model_init_kwargs": {"attention_dropout": 0.2, "attn_implementation": "eager"}}


def offline(student_dir, cache, teacher_dir, tmp_path, **given):
    return OfflineKDModule(student_dir, str(cache.path), **DROPOUT, **given), KDDataModule(str(cache.path))


def panel(student_dir, cache, teacher_dir, tmp_path, **given):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    module = TeacherPanelModule(student_dir, {"a": teacher_dir}, max_completion_length=6, **DROPOUT, **given)
    return module, KDDataModule(prompts=str(path), batch_size=4)


@pytest.mark.parametrize("host", [offline, panel], ids=lambda host: host.__name__)
def test_training_does_not_notice(host, tasks, tmp_path, student_dir, teacher_dir, cache):
    """Dropout is on, rows are shuffled, the panel's student samples; and the weights are the same to the last bit."""
    found = []
    for given in ({}, {"eval_tasks": tasks}):
        torch.manual_seed(3)
        module, data = host(student_dir, cache, teacher_dir, tmp_path, **given)
        often = {"val_check_interval": 1} if given else {}
        runner = trainer(tmp_path / str(len(found)), max_steps=4, max_epochs=-1, **often)
        runner.fit(module, data)
        found.append({name: value.clone() for name, value in module.model.state_dict().items()})
    assert "val/own/accuracy" in runner.callback_metrics and "val/own/accuracy_error" in runner.callback_metrics
    steps = sorted(path.name for path in (tmp_path / "1" / "evaluations").iterdir())
    assert steps == ["step-1", "step-2", "step-3", "step-4"]
    assert load_evaluation(tmp_path / "1" / "evaluations" / "step-4").results["own"].questions == 5
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_checkpoints_and_the_stop_go_by_it_and_lineage_tells(tasks, tmp_path, student_dir, cache, monkeypatch):
    scripted(monkeypatch, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5)
    chosen = {"monitor": "val/own/accuracy", "mode": "max"}
    best = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=1, save_on_train_epoch_end=False, **chosen)
    stop = EarlyStopping(patience=2, check_on_train_epoch_end=False, **chosen)
    module = OfflineKDModule(student_dir, str(cache.path), eval_tasks=tasks)
    runner = trainer(
        tmp_path, [best, stop], max_steps=20, max_epochs=-1, val_check_interval=1, enable_checkpointing=True
    )
    runner.fit(module, KDDataModule(str(cache.path)))
    assert runner.global_step == 4 and best.best_model_path.endswith("step=2.ckpt")
    assert float(best.best_model_score) == 1.0
    assert load_record(best.best_model_path)["evaluation"]["own"]["pass@1"]["value"] == 1.0


class Validating(Plain):
    def validation_step(self, batch, batch_idx):
        pass


def test_it_goes_on_a_module_of_the_users_own(tasks, tmp_path, student_dir, cache, tokenizer):
    callback = TaskEvaluation(tasks, tokenizer=tokenizer, eval_tasks_batch_size=3)
    runner = trainer(tmp_path, [OfflineKD(cache.path), callback], max_steps=4)
    runner.fit(Validating(student_dir), loader(cache), NoRows())
    assert 0 <= float(runner.callback_metrics["val/own/accuracy"]) <= 1


def test_a_trainer_that_never_validates_is_refused(tasks, tmp_path, student_dir, cache, tokenizer):
    with pytest.raises(ConfigError, match="answered at validation, and this trainer has none"):
        trainer(tmp_path, [TaskEvaluation(tasks, tokenizer=tokenizer)]).fit(Plain(student_dir), loader(cache))


def test_wrong_tasks_are_refused_at_once(student_dir):
    with pytest.raises(ConfigError, match="expected `tasks`"):
        TaskEvaluation({"tasks": {}})
