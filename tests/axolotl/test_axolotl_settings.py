import dataclasses

import pytest

from kd_plugin.axolotl.settings import evaluating, settings_of
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError
from kd_plugin.evaluation import EvaluationSettings
from kd_plugin.panel.settings import PanelSettings

REFUSED = [
    ({"kd_plugin": {"teacher_cach": "c"}}, "Did you mean 'teacher_cache'"),
    ({"kd_plugin": {"teacher_cache": "c", "offline": {"ce_wieght": 1}}}, "Did you mean 'ce_weight'"),
    ({"kd_plugin": {"teacher_cache": "c", "offline": {"temperature": -1}}}, "temperature"),
    ({"kd_plugin": {"teacher_cache": "c", "panel": {}, "prompts": "p"}}, "choose one"),
    ({"kd_plugin": {"offline": {}}}, "neither teacher_cache nor teacher_text"),
    ({"kd_plugin": {"panel": {"teacher_models": {"a": "b"}}}}, "panel needs prompts"),
    ({"kd_plugin": {"panel": {"divergense": "reverse_kl"}, "prompts": "p"}}, "Did you mean 'divergence'"),
    ({"kd_plugin": {"prompts": "p"}}, "prompts are for panel"),
    ({"kd_plugin": "cache"}, "expected a mapping"),
    ({"kd_plugin": {"teacher_cache": "c"}, "sample_packing": True}, "sample_packing"),
    ({"kd_plugin": {"teacher_cache": "c"}, "rl": "dpo"}, "a trainer of their own"),
    ({"kd_plugin": {"eval_taks": "t.yaml"}}, "Did you mean 'eval_tasks'"),
    ({"kd_plugin": {"eval_tasks": "t.yaml"}}, "set eval_steps beside kd_plugin"),
    ({"kd_plugin": {"eval_tasks": "t.yaml"}, "eval_strategy": "no"}, "set eval_steps beside kd_plugin"),
    (
        {"kd_plugin": {"eval_tasks": "t.yaml", "eval_tasks_batch_size": 0}, "eval_steps": 5},
        "eval_tasks_batch_size is 0",
    ),
]


@pytest.mark.parametrize(("cfg", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_wrong_key_is_named_before_anything_is_loaded(cfg, said):
    with pytest.raises(ConfigError, match=said):
        settings_of(cfg)


def test_settings_reach_the_dataclasses_whole():
    offline = {"ce_weight": 0.25, "divergence": "reverse_kl", "tail": "bucket"}
    asked = settings_of({"kd_plugin": {"teacher_cache": {"a": 1.0, "b": 3.0}, "offline": offline}})
    assert asked.teacher_cache == {"a": 1.0, "b": 3.0}
    assert asked.offline_settings() == OfflineSettings(**offline)
    panel = {f.name: getattr(PanelSettings(), f.name) for f in dataclasses.fields(PanelSettings)} | {"beta": 0.5}
    assert settings_of({"kd_plugin": {"panel": panel, "prompts": "p"}}).panel_settings() == PanelSettings(beta=0.5)


def test_without_a_teacher_the_run_is_followed_and_packing_is_free():
    asked = settings_of({"kd_plugin": {"lineage": {"use": {"distribute": True}}}, "sample_packing": True})
    assert not asked.is_offline and not asked.is_panel and asked.lineage == {"use": {"distribute": True}}
    assert settings_of({}).lineage is None


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"eval_steps": 20}, {"eval_strategy": "steps", "eval_steps": 20}),
        ({"eval_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"evals_per_epoch": 4, "num_epochs": 2}, {"eval_strategy": "steps", "eval_steps": 0.125}),
        (
            {"eval_steps": 20, "load_best_model_at_end": True},
            {"eval_strategy": "steps", "eval_steps": 20, "load_best_model_at_end": True},
        ),
    ],
    ids=str,
)
def test_questions_are_asked_when_the_configuration_says(beside, expected):
    tasks = {"tasks": {"own": {"rows": "own.jsonl", "verify": "exact"}}}
    cfg = {"kd_plugin": {"eval_tasks": tasks, "eval_tasks_batch_size": 3}, **beside}
    assert settings_of(cfg).evaluation() == EvaluationSettings(tasks, 3)
    assert evaluating(cfg) == {**expected, "eval_on_start": True}
