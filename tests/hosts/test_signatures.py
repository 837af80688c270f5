"""The trainers and configurations take what their parents take, in the same order and by the same names."""

import dataclasses
import inspect
import pydoc

import pytest
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import ConfigError
from kd_plugin.panel import TeacherPanel
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import ROWS, losses, prompts, settings

PARENTS = {OfflineKDTrainer: SFTTrainer, TeacherPanelTrainer: DistillationTrainer}
METHODS = ("evaluate", "predict", "compute_loss", "prediction_step", "evaluation_loop", "log", "save_model",
           "get_train_dataloader", "get_eval_dataloader", "training_step")  # fmt: skip


@pytest.mark.parametrize("trainer", PARENTS)
def test_arguments_come_in_the_parents_order(trainer):
    mine = list(inspect.signature(trainer.__init__).parameters.values())
    theirs = list(inspect.signature(PARENTS[trainer].__init__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in mine[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in mine[len(theirs) :])
    shown = pydoc.render_doc(trainer, renderer=pydoc.plaintext)
    assert all(f"{p.name}:" in shown for p in mine[1:])


@pytest.mark.parametrize("trainer", PARENTS)
def test_methods_take_what_the_parents_take(trainer):
    for name in METHODS:
        mine, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (trainer, PARENTS[trainer]))
        assert list(mine) == list(theirs), name
        assert [p.default for p in mine.values()] == [p.default for p in theirs.values()], name
    train = inspect.signature(trainer.train).parameters
    assert list(train) == list(inspect.signature(PARENTS[trainer].train).parameters)


@pytest.mark.parametrize(
    ("mine", "parent"),
    [(OfflineKDConfig, SFTConfig), (TeacherPanelConfig, DistillationConfig)],
    ids=lambda c: c.__name__,
)
def test_fields_come_in_the_parents_order_with_its_defaults(mine, parent):
    theirs = dataclasses.fields(parent)
    for own, field in zip(dataclasses.fields(mine), theirs, strict=False):
        assert own.name == field.name
        assert own.default == field.default and own.default_factory == field.default_factory, own.name
    assert list(inspect.signature(mine).parameters)[: len(theirs)] == list(inspect.signature(parent).parameters)


def test_datasets_by_position(tmp_path, student_dir, teacher_dir):
    cache = capture(ROWS, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(16), progress=False)
    args = OfflineKDConfig(**settings(tmp_path / "a", max_steps=1))
    trainer = OfflineKDTrainer(student_dir, args, None, ROWS, ROWS.select(range(4)), teacher_cache=cache)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (16, 4)
    args = TeacherPanelConfig(**settings(tmp_path / "b", max_steps=1, max_completion_length=4))
    trainer = TeacherPanelTrainer(student_dir, teacher_dir, args, prompts(), prompts(count=4))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (24, 4)
    trainer.train()
    assert len(losses(trainer)) == 1


class TestTeacherInitKwargs:
    """TRL refuses ``teacher_model_init_kwargs`` that reach no teacher."""

    def build(self, directory, student, teacher=None, teachers=None, **kwargs):
        return TeacherPanelTrainer(
            student,
            teacher,
            TeacherPanelConfig(**settings(directory, max_steps=1, max_completion_length=4, **kwargs)),
            prompts(),
            teacher_models=teachers,
        )

    @pytest.mark.parametrize("setting", [{"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
                                         {"teacher_model_revision": "main"}], ids=["kwargs", "revision"])  # fmt: skip
    @pytest.mark.parametrize("form", ["model", "mapping", "teacher", "panel", "block"])
    def test_loaded_teachers(self, form, setting, tmp_path, student_dir, teacher_dir):
        loaded = LocalTeacher(teacher_dir, dtype="float32")
        given = {
            "model": {"teacher": loaded.model},
            "mapping": {"teachers": {"a": loaded.model}},
            "teacher": {"teacher": loaded},
            "panel": {"teachers": TeacherPanel({"a": teacher_dir})},
            "block": {"panel": {"teachers": {"a": {"model": teacher_dir}}}},
        }[form]
        with pytest.raises(ConfigError, match=rf"{next(iter(setting))}.*LocalTeacher"):
            self.build(tmp_path, student_dir, **given, **setting)

    def test_teachers_by_path(self, tmp_path, student_dir, teacher_dir, other_teacher_dir):
        settings = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}, "combine": "weighted_kl"}
        mixed = {"a": teacher_dir, "b": LocalTeacher(other_teacher_dir, dtype="float32")}
        trainer = self.build(tmp_path, student_dir, teachers=mixed, **settings)
        dtypes = [str(trainer.panel.teachers[name].model.dtype) for name in "ab"]
        assert dtypes == ["torch.bfloat16", "torch.float32"]
