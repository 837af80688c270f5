"""Both hosts refuse a cache whose targets seem shifted, and train on it where ``allow_misaligned`` is set."""

import pytest

from kd_plugin.cache import TopK, alignment
from kd_plugin.capturing import capture
from kd_plugin.errors import CacheError
from kd_plugin.lightning import OfflineKD, TeacherPanelCorrection
from kd_plugin.panel.warmup import require_fitting
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import prompts, settings
from tests.lightning.help import ROWS, Plain, loader, trainer

LINEAGE = {"student": {"license": "mit"}}


@pytest.fixture
def cache(teacher_dir, tmp_path, monkeypatch):
    """A cache that is measured as shifted."""
    made = capture(ROWS, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(8), progress=False)
    monkeypatch.setattr(alignment.TargetFit, "shift", property(lambda self: 1))
    return made


def test_offline_kd_in_trl(cache, student_dir, tmp_path):
    def made(**more):
        args = OfflineKDConfig(**settings(tmp_path / "out", max_steps=1), **more)
        return OfflineKDTrainer(student_dir, args, teacher_cache=cache)

    with pytest.raises(CacheError, match="set allow_misaligned=True"):
        made()
    made(allow_misaligned=True).train()


def test_a_warm_up_in_trl(cache, student_dir, teacher_dir, tmp_path):
    def made(**more):
        run = settings(tmp_path / "out", max_steps=1, warmup_cache=str(cache.path), warmup_cache_steps=1)
        args = TeacherPanelConfig(**run, max_completion_length=4, **more)
        return TeacherPanelTrainer(student_dir, teacher_dir, args=args, train_dataset=prompts())

    with pytest.raises(CacheError, match="set allow_misaligned=True"):
        made()
    made(allow_misaligned=True).train()


def test_offline_kd_in_lightning(cache, student_dir, tmp_path):
    def fit(**more):
        callback = OfflineKD(cache, lineage=LINEAGE, **more)
        trainer(tmp_path, [callback], max_steps=1).fit(Plain(student_dir), loader(cache))

    with pytest.raises(CacheError, match="set allow_misaligned=True"):
        fit()
    fit(allow_misaligned=True)


def test_a_warm_up_in_lightning(cache, teacher_dir):
    """The callback's settings hold the switch; what it hands it to is shared with TRL."""
    fields = {"teachers": {"a": teacher_dir}, "warmup_cache": str(cache.path), "warmup_cache_steps": 1}
    assert TeacherPanelCorrection(**fields, allow_misaligned=True).settings.allow_misaligned is True
    vocabulary = LocalTeacher(teacher_dir).vocabulary
    with pytest.raises(CacheError, match="set allow_misaligned=True"):
        require_fitting([cache], vocabulary)
    require_fitting([cache], vocabulary, allow_misaligned=True)


@pytest.mark.parametrize("config", [OfflineKDConfig, TeacherPanelConfig])
def test_it_is_an_option_of_the_command_line(config):
    assert config.__dataclass_fields__["allow_misaligned"].default is False
